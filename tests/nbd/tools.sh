#!/usr/bin/env bash
# Runs NBD clients that others wrote against `tmem run --frontend nbd`: nbdinfo, nbdcopy, nbdsh,
# qemu-img, qemu-io and fio. No kernel support is needed, and no privilege: the daemon runs without
# its guards.
#
#   tests/nbd/tools.sh [TMEM]
#
# Ends with a line "N passed, M failed", and 0 only if none failed. A tool that is not there fails.

set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tmem=${1:-$root/target/release/tmem}
work=$(mktemp -d)
passed=0 failed=0
daemon=''
trap 'stop KILL; rm -rf "$work"' EXIT

# check NAME COMMAND...: the command succeeds, in a minute. What it prints is shown when it does not.
check() {
    local name=$1 status
    shift
    timeout --kill-after=5 60 "$@" >"$work/output" 2>&1 </dev/null
    status=$?
    verdict "$name" $status
    [ $status = 0 ] || tail -15 "$work/output" | sed 's/^/      | /'
}

verdict() {
    if [ "$2" = 0 ]; then
        passed=$((passed + 1))
        echo "ok    $1"
    else
        failed=$((failed + 1))
        echo "FAIL  $1: status $2"
    fi
}

# says PATTERN...: what the last check printed.
says() {
    local pattern
    for pattern in "$@"; do
        grep -qE -e "$pattern" "$work/output"
        verdict "  it says: $pattern" $?
    done
}

start() {
    "$tmem" --control "$work/control.sock" run --best-effort --frontend nbd \
        --nbd "unix:$work/nbd.sock" --pool-limit 320M "$@" >"$work/daemon.out" 2>"$work/daemon.log" &
    daemon=$!
    local wanted
    wanted=$(printf '%s\n' "$@" | grep -c -- --swap)
    for _ in $(seq 300); do
        [ "$(wc -l <"$work/daemon.out")" = "$wanted" ] && return
        kill -0 $daemon 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/daemon.log"
    echo "0 passed, 1 failed: the daemon did not start"
    exit 1
}

stop() {
    [ -n "$daemon" ] || return 0
    kill "-$1" $daemon 2>/dev/null
    wait $daemon
    local status=$?
    daemon=''
    return $status
}

uri() { echo "nbd+unix:///$1?socket=$work/nbd.sock"; }
ask() { "$tmem" --control "$work/control.sock" "$@"; }

# A device with data, zeros and holes in it, of which the tools must find each.
make_image() {
    truncate -s 256M "$work/image"
    dd if=/dev/urandom of="$work/image" bs=1M count=3 seek=10 conv=notrunc status=none
    dd if=/bin/bash of="$work/image" bs=4k seek=12345 conv=notrunc status=none
    dd if=/dev/urandom of="$work/image" bs=4k count=1 seek=65535 conv=notrunc status=none
}

[ -x "$tmem" ] || { echo "0 passed, 1 failed: no $tmem (cargo build --release)"; exit 1; }
start --swap 256M,name=disk --swap 64M,name=other
make_image

check "nbdinfo lists the exports" nbdinfo --list "$(uri '')"
says 'export="disk"' 'export="other"'
check "nbdinfo describes an export" nbdinfo "$(uri disk)"
says 'export-size: 268435456' 'base:allocation' 'can_multi_conn: true' 'can_trim: true' \
    'can_zero: true' 'can_flush: true' 'can_fua: true' 'block_size_minimum: 512' \
    'block_size_preferred: 4096' 'block_size_maximum: 33554432'

check "nbdcopy to the export" nbdcopy "$work/image" "$(uri disk)"
check "nbdcopy from the export" nbdcopy "$(uri disk)" "$work/copy"
check "the copy is the same" cmp "$work/image" "$work/copy"
check "and as sparse" test "$(du -k "$work/copy" | cut -f1)" -lt 8192
check "only what is not zeros is held" test \
    "$(ask stats --json | /usr/bin/python3 -c 'import json,sys; print(json.load(sys.stdin)["total"]["orig_data_size"])')" -lt $((8 << 20))
check "nbdcopy, many requests, small ones" nbdcopy --requests=64 --request-size=4096 \
    --connections=4 "$(uri disk)" "$work/copy"
check "it is the same, too" cmp "$work/image" "$work/copy"
check "nbdcopy within the daemon" nbdcopy --allocated "$(uri other)" "$(uri other)"
check "nbdinfo maps holes" nbdinfo --map "$(uri disk)"
says '^ *0 +10485760 +3' '^ *10485760 +3145728 +0'

check "qemu-img compares" qemu-img compare -f raw -F raw "$work/image" "$(uri disk)"
check "qemu-img converts" qemu-img convert -f raw -O raw "$(uri disk)" "$work/converted"
check "what it converted is the same" cmp "$work/image" "$work/converted"
check "qemu-io reads and writes at any alignment" qemu-io -f raw \
    -c 'write -P 7 513 1023' -c 'read -P 7 513 1023' -c 'read -P 0 0 513' -c 'read -P 0 1536 512' \
    -c 'write -z 4096 1000' -c 'discard 0 64k' -c 'read -P 0 0 64k' -c 'flush' \
    -c 'write -P 3 1M 8M' -c 'write -z -u 2M 4M' -c 'read -P 0 2M 4M' -c 'read -P 3 1M 1M' \
    -c 'read -P 3 6M 3M' -c 'aio_write -P 9 100k 300k' -c 'aio_flush' -c 'read -P 9 100k 300k' "$(uri disk)"
for failure in 'Pattern verification failed' 'failed: '; do
    ! grep -q "$failure" "$work/output"
    verdict "  it does not say: $failure" $?
done

check "nbdsh: sequences of requests that are wrong" /usr/bin/python3 "$root/tests/nbd/wrong.py" \
    "$work/nbd.sock"
check "fio verifies what it wrote, at any size" fio --name=verify --ioengine=nbd \
    --uri="$(uri other)" --size=60M --rw=randrw --bsrange=512-300k --iodepth=16 --number_ios=3000 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --directory="$work"
check "fio verifies, several at a time" fio --name=verify --ioengine=nbd --uri="$(uri other)" \
    --size=15M --offset_increment=16M --numjobs=4 --thread --rw=randwrite --bs=4k --iodepth=32 \
    --verify=xxhash --verify_fatal=1 --do_verify=1 --verify_state_save=0 --directory="$work"

# A client that stays keeps its device, and the daemon; when it goes, both may go.
coproc CLIENT { exec /usr/bin/python3 -c "
import nbd, sys
h = nbd.NBD(); h.set_export_name('disk'); h.connect_unix('$work/nbd.sock')
print('connected', flush=True); sys.stdin.readline()"; }
client=$CLIENT_PID
read -r -t 60 -u "${CLIENT[0]}" _
ask del disk >"$work/output" 2>&1
verdict "a device with a client is not removed (exit code 5)" $(($? != 5))
says "'disk' is in use by NBD clients \(1 connections\)"
echo go >&"${CLIENT[1]}"
wait "$client"
for _ in $(seq 100); do
    [ "$(ask list --noheadings --raw -o CONNECTIONS | sort -u)" = 0 ] && break
    sleep 0.1
done
check "and removed when the client has gone" "$tmem" --control "$work/control.sock" del disk
stop TERM
verdict "the daemon ends well" $?
[ ! -e "$work/nbd.sock" ]
verdict "and its socket is gone" $?

echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
