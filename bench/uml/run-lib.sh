# What the bench's programs for User-mode Linux share: the way of a script into a guest, and of its
# samples out of it. Sourced behind bench/vm/run-lib.sh.
#
# The guest sees this machine's files, and writes only into file systems of its own. It has one
# processor of the host: a system call in it is a switch between two processes here.

# ensure_uml NAMES: the kernel is built, and what the guest has besides (scripts/vm --with) is installed.
ensure_uml() {
    "$root/bench/uml/build" >/dev/null
    # The same programs run in the one guest as in the other.
    "$root/scripts/vm" --with "$1" --ensure
}

uml_kernel() {
    local kernel
    kernel=$("$root/bench/uml/build" --path)
    echo "${kernel##*/linux-}"
}

# answer ARGUMENT NAMES: to --ensure, --platform and --kernel, and ends; returns on any other.
answer() {
    case $1 in
        --ensure) ensure_uml "$2"; exit ;;
        --platform) echo uml; exit ;;
        --kernel) uml_kernel; exit ;;
    esac
}

# in_uml SCRIPT MEMORY K=V...: runs a script of bench/vm, for at most UML_SECONDS; its samples are added to the output.
in_uml() {
    local script=$1 memory=$2 kernel status
    shift 2
    kernel=$("$root/bench/uml/build" --path)
    "$root/scripts/vm" --build
    # The guest's scripts lie side by side, as in the virtual machine.
    job=$(mktemp -d)
    linux=''
    trap '[ -z "$linux" ] || kill "$linux" 2>/dev/null; rm -rf "$job"' EXIT
    trap 'exit 130' INT TERM HUP
    mkdir "$job/bin" "$job/results"
    cp "$root"/tests/vm/lib.sh "$root"/bench/vm/{*.sh,job.py} "$root/bench/fio/device.fio" "$job/"
    cp "$root/bench/uml/init" "$job/init"
    cp "$target/guest/x86_64-unknown-linux-gnu/release/tmem-guest" "${TMEM_BIN:-$target/release/tmem}" \
        ${null:+"$null"} "$job/bin/"
    printf 'export %q\n' "SCRIPT=$script" "$@" >"$job/environment"

    say "$script: User-mode Linux $(uml_kernel), pinned to processor 0"
    timeout --kill-after=5 "${UML_SECONDS:-1800}" taskset -c 0 "$kernel" "mem=$memory" ncpus=1 \
        root=/dev/root rootfstype=hostfs hostfs=/ rw init="$job/init" con=null con0=fd:0,fd:1 seccomp=on \
        null_blk.nr_devices=0 quiet </dev/null >"$job/console" 2>&1 &
    linux=$!
    touch "$job/output"
    tail --pid=$linux -n +1 -f "$job/output" >&2
    wait $linux || true
    linux=''
    [ ! -e "$job/results/samples.jsonl" ] || cat "$job/results/samples.jsonl" >>"$output"
    status=$(cat "$job/results/status" 2>/dev/null) || {
        tail -20 "$job/console" >&2
        die "User-mode Linux ended before its script did"
    }
    [ "$status" = 0 ] || die "$script failed with status $status"
}
