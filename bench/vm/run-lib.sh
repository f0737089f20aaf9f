# What the bench's programs on the host share: their command line, and the way of samples out of a guest.
# Sourced; `root` is the repository.

target=${CARGO_TARGET_DIR:-$root/target}
quick='' output='' density=''
# How the guest of scripts/vm is to run, besides.
machine=()

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
            --platform | --kernel) exec "$root/scripts/vm" "${machine[@]}" "$1" ;;
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
    "$root/scripts/vm" "${machine[@]}" "$@" --results "$results" --file "$root/bench/vm/contenders.sh" \
        --file "$root/bench/vm/disk.sh" \
        -- "$root/bench/vm/$script" >&2 || status=$?
    [ ! -e "$results/samples.jsonl" ] || cat "$results/samples.jsonl" >>"$output"
    [ ! -e "$results/density.jsonl" ] || cat "$results/density.jsonl" >>"$density"
    [ "$status" = 0 ] || die "$script failed with status $status"
}

# The programs that swap, how large they are and what they say where memory is enough: here. Leaves that
# in PROGRAMS, for the environment of swap.sh.
known_results() {
    local lines=${SORT_LINES:-600000} records=${PYTHON_RECORDS:-60000} guest sort_sum python_sum
    guest=$target/guest/x86_64-unknown-linux-gnu/release/tmem-guest
    "$root/scripts/vm" --build
    sort_sum=$("$guest" lines --count "$lines" | LC_ALL=C sort | md5sum)
    python_sum=$(/usr/bin/python3 -I -B "$root/bench/vm/job.py" "$records")
    PROGRAMS=(TOUCH_MEMORY="${TOUCH_MEMORY:-230M}" TOUCHES="${TOUCHES:-20000}"
        GROUP_MEMORY="${GROUP_MEMORY:-100M}" SORT_LINES="$lines" SORT_BUFFER="${SORT_BUFFER:-256M}" SORT_SUM="${sort_sum%% *}"
        PYTHON_RECORDS="$records" PYTHON_SUM="$python_sum")
}
