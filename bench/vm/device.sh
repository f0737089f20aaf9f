# device.sh: block devices side by side, by the jobs of device.fio.
#
# All devices are there at the same time and filled with the same data. Then every case is run on
# each in turn, round after round, so that what changes in the machine meanwhile changes for all.
#
# With a disk of the serial `input`, the same pages of real heaps go to tmem and to zram with each of
# its compressors, and what they take for them goes to density.jsonl.
#
#   ROUNDS (5), MILLISECONDS (1500): how often and how long; CONTENDERS_WANTED: which

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/contenders.sh"
JOBS=$(cd "$(dirname "$0")" && pwd)/device.fio
CASES=(randread-4k-qd1 randread-4k-qd32 read-128k randwrite-4k-qd1 randwrite-4k-qd32 write-128k)
SIZE=256M POOL_LIMIT=192M CONTENDERS=()
cd /tmp

# fio_run CONTENDER SECTION TIME: leaves what fio found in /tmp/fio.json.
fio_run() {
    timeout 120 fio --filename="${DEVICE_OF[$1]}" --runtime="$3" --section="$2" \
        --output-format=json --output=/tmp/fio.json "$JOBS" >/tmp/fio.log 2>&1
}

found() { tmem-guest json "$@" </tmp/fio.json; }

# measure CASE CONTENDER
measure() {
    local way='read' iops mean p50 p99 kib errors
    case $1 in *write*) way=write ;; esac
    fio_run "$2" "$1" "${MILLISECONDS:-1500}ms" || give_up "$1 on $2: fio: $(tail -3 /tmp/fio.log)"
    read -r errors iops kib mean p50 p99 < <(found jobs.0.error jobs.0.$way.{iops,bw,lat_ns.mean} \
        jobs.0.$way.lat_ns.percentile.{50,99}.000000)
    [ "$errors" = 0 ] && [ -n "$p99" ] || give_up "$1 on $2: fio says nothing or errors: $errors"
    case $1 in
        *-128k) sample "$1" "$2" throughput "$(awk -v k="$kib" 'BEGIN { print k / 1024 }')" ;;
        *) sample "$1" "$2" iops "$iops" ;;
    esac
    sample "$1" "$2" latency_mean "$(us "$mean")"
    sample "$1" "$2" latency_p50 "$(us "$p50")"
    sample "$1" "$2" latency_p99 "$(us "$p99")"
    pass "$(printf '%-18s %-12s %8.0f/s %7.1f MiB/s, mean %s us, p50 %s, p99 %s' "$1" "$2" "$iops" \
        "$(awk -v k="$kib" 'BEGIN { print k / 1024 }')" "$(us "$mean")" "$(us "$p50")" "$(us "$p99")")"
}

# The pool alone: a daemon's own memory is the same for a page and for a million of them.
measure_density() {
    local disk input='' contender bytes
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial" 2>/dev/null)" != input ] || input=/dev/${disk##*/}
    done
    [ -n "$input" ] || return 0
    bytes=$(blockdev_bytes "$input")
    SAMPLES=${SAMPLES%/*}/density.jsonl
    for contender in tmem-ublk zram-lz4 zram-lzo-rle zram-zstd; do
        start "$contender" $SIZE || { not_run "$contender" "$reason"; continue; }
        dd if="$input" of="$DEVICE" bs=128k oflag=direct status=none || give_up "cannot fill $contender"
        sample fresh "$contender" bytes_per_byte \
            "$(awk -v a="$(pool_of "$contender")" -v b="$bytes" 'BEGIN { printf "%.4f", a / b }')"
        pass "$contender takes $(pool_of "$contender") bytes for $bytes of real heaps"
        stop "$contender"
    done
}

us() { awk -v ns="$1" 'BEGIN { printf "%.1f", ns / 1000 }'; }

say "clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource), $(nproc) cpus"
for contender in $CONTENDERS_WANTED; do
    if ! start "$contender" $SIZE; then
        not_run "$contender" "$reason"
        continue
    fi
    CONTENDERS+=("$contender")
    fio_run "$contender" fill 0 || give_up "$contender cannot be filled: $(tail -3 /tmp/fio.log)"
    pass "$contender: $DEVICE is filled"
done
for round in $(seq "${ROUNDS:-5}"); do
    say "round $round"
    for case in "${CASES[@]}"; do
        for contender in "${CONTENDERS[@]}"; do
            measure "$case" "$contender"
        done
    done
done
for contender in "${CONTENDERS[@]}"; do stop "$contender"; done
measure_density
finish
