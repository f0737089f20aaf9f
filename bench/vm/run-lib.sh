# What the bench's programs on the host share: their command line, and the way of samples out of a guest.
# Sourced; `root` is the repository.

target=${CARGO_TARGET_DIR:-$root/target}
quick='' output='' density=''

say() { echo "bench: $*" >&2; }
die() {
    say "$*"
    exit 1
}

# Reads the command line; answers --platform and --kernel, and ends.
parse_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --quick) quick=yes ;;
            --output) output=$2; shift ;;
            --density) density=$2; shift ;;
            --platform | --kernel) exec "$root/scripts/vm" "$1" ;;
            *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        esac
        shift
    done
    [ -n "$output" ] || die "--output FILE says where the samples go"
    [ -x "${TMEM_BIN:-$target/release/tmem}" ] ||
        die "tmem is not built: cargo build --release --package tmem-ublk-target"
    : >"$output"
}

build_null() {
    cargo build --quiet --locked --release --manifest-path "$root/Cargo.toml" --package ublk-null
    null=$target/release/ublk-null
}

# in_guest SCRIPT OPTIONS...: runs a script of bench/vm by scripts/vm; its samples are added to the output.
in_guest() {
    local script=$1 status=0
    shift
    results=$(mktemp -d)
    trap 'rm -rf "$results"' EXIT
    "$root/scripts/vm" "$@" --ensure
    "$root/scripts/vm" "$@" --results "$results" --file "$root/bench/vm/contenders.sh" \
        -- "$root/bench/vm/$script" >&2 || status=$?
    [ ! -e "$results/samples.jsonl" ] || cat "$results/samples.jsonl" >>"$output"
    [ ! -e "$results/density.jsonl" ] || cat "$results/density.jsonl" >>"$density"
    [ "$status" = 0 ] || die "$script failed with status $status"
}
