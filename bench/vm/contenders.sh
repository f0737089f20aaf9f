# The block devices that are measured against each other: how each is made, what memory it takes, and
# how it goes. Sourced behind lib.sh by the guest scripts of the bench.
#
# A contender that cannot be had here is named with the reason in the results and in the output, and
# left out; one that broke down once it was there fails the run, and so does a run without one of REQUIRED: tmem's
# default front end, or what it is compared with.

declare -A DEVICE_OF PID_OF WRITER_OF
SAMPLES=${SAMPLES:-/results/samples.jsonl}
REQUIRED=${REQUIRED:-tmem-ublk zram-lz4}

# sample CASE CONTENDER METRIC VALUE
sample() {
    local unit better=lower
    case $3 in
        latency_* | fault_*) unit=us ;;
        iops) unit=1/s better=higher ;;
        throughput) unit=MiB/s better=higher ;;
        wall) unit=s ;;
        pages_*) unit=pages better=none ;;
        memory_used | disk_written) unit=bytes ;;
        disk_read) unit=bytes better=none ;;
        bytes_per_byte | written_per_byte) unit=ratio ;;
    esac
    printf '{"case":"%s","contender":"%s","metric":"%s","unit":"%s","better":"%s","value":%s}\n' \
        "$1" "$2" "$3" "$unit" "$better" "$4" >>"$SAMPLES"
}

# not_run CONTENDER REASON..., or not_run_in CASE CONTENDER REASON...
not_run() { not_run_in '' "$@"; }
not_run_in() {
    local case=$1 contender=$2 reason
    shift 2
    reason=$(tr '\n\t"\\' "  ''" <<<"$*" | cut -c1-300)
    case " $REQUIRED " in
        *" $contender "*) fail "$contender${case:+ in $case}: not run: $reason" ;;
        *) skip "$contender${case:+ in $case}: not run: $reason" ;;
    esac
    printf '{"contender":"%s",%s"not_run":"%s"}\n' "$contender" "${case:+\"case\":\"$case\",}" \
        "${reason% }" >>"$SAMPLES"
}

# start CONTENDER SIZE: makes its device, and sets DEVICE. If that fails, `reason` says why.
start() {
    local name=$1 size=$2
    DEVICE='' reason=''
    case $name in
        tmem-ublk | tmem-nbd | tmem-backed) start_daemon "$name" "$size" ;;
        zram-writeback) start_zram_device lz4 "$size" "$SWAP_DISK" && start_writer "$name" ;;
        zram-*) start_zram_device "${name#zram-}" "$size" ;;
        ublk-null) start_null "$size" ;;
        nbdkit-zstd) start_nbdkit "$size" ;;
        zswap | disk) DEVICE=$SWAP_DISK ;;
        *) give_up "there is no contender $name" ;;
    esac && [ -b "$DEVICE" ] || {
        reason=${reason:-${DEVICE:-its device} is no block device}
        stop "$name"
        return 1
    }
    DEVICE_OF[$name]=$DEVICE
}

# Kernels that have no modules have what they have.
load() { modprobe "$@" 2>/dev/null || true; }

# said_something FILE PID: the program has said something, or has ended.
said_something() { [ -s "$1" ] || ! kill -0 "$2" 2>/dev/null; }

start_daemon() {
    local name=$1 size=$2 out=/tmp/$1.out args=(--swap "$2,name=swap0")
    if [ "$name" = tmem-nbd ]; then
        load nbd nbds_max=4
        args+=(--frontend nbd --nbd unix:/run/tmem/nbd.sock)
    else
        load ublk_drv
    fi
    # By force, for the swap of another contender was there before.
    [ "$name" != tmem-backed ] || args+=(--backing "$SWAP_DISK" --force --no-encrypt-backing)
    : >"$out"
    tmem run --control "/run/tmem/$name.sock" --pool-limit "${POOL_LIMIT:-60%}" "${args[@]}" \
        >"$out" 2>"/tmp/$name.log" &
    PID_OF[$name]=$!
    wait_for 60 said_something "$out" $!
    if ! kill -0 "${PID_OF[$name]}" 2>/dev/null; then
        reason="tmem run: $(head -3 "/tmp/$name.log")"
        return 1
    fi
    if [ "$name" = tmem-nbd ]; then
        attach_nbd /dev/nbd0 /run/tmem/nbd.sock -N swap0 -C 2
    else
        DEVICE=$(awk 'NR == 1 { print $2 }' "$out")
    fi
}

# attach_nbd DEVICE SOCKET ARGS...
attach_nbd() {
    local device=$1 socket=$2
    shift 2
    wait_for 30 test -S "$socket"
    nbd-client -unix "$socket" "$device" -block-size 4096 -timeout 0 "$@" >/tmp/nbd-client.log 2>&1 || {
        reason="nbd-client: $(tail -2 /tmp/nbd-client.log)"
        return 1
    }
    DEVICE=$device
}

start_nbdkit() {
    load nbd nbds_max=4
    command -v nbdkit >/dev/null || { reason="there is no nbdkit here"; return 1; }
    nbdkit --foreground --unix /tmp/nbdkit.sock memory "$1" allocator=zstd 2>/tmp/nbdkit.log &
    PID_OF[nbdkit-zstd]=$!
    attach_nbd /dev/nbd1 /tmp/nbdkit.sock -C 2 || reason+="; $(head -2 /tmp/nbdkit.log)"
    [ -z "$reason" ]
}

start_null() {
    load ublk_drv
    : >/tmp/null.out
    ublk-null "$(bytes "$1")" "$(nproc)" 128 >/tmp/null.out 2>/tmp/null.log &
    PID_OF[ublk-null]=$!
    wait_for 30 said_something /tmp/null.out $!
    DEVICE=$(cat /tmp/null.out)
    [ -n "$DEVICE" ] || { reason=$(head -3 /tmp/null.log); return 1; }
}

# start_zram_device COMPRESSOR SIZE [BACKING]. One zram device is used by one compressor at a time; each gets a
# device of its own. With a disk behind it, what it takes is limited to POOL_LIMIT, its table included.
start_zram_device() {
    local number set
    load zram num_devices=0
    number=$(cat /sys/class/zram-control/hot_add) || { reason="the kernel has no zram"; return 1; }
    DEVICE=/dev/zram$number set=/sys/block/zram$number
    echo "$1" >"$set/comp_algorithm" || { reason="zram has no $1"; return 1; }
    if [ -n "${3:-}" ]; then
        [ -e "$set/backing_dev" ] || { reason="this kernel's zram has no writeback"; return 1; }
        echo "$3" >"$set/backing_dev" || { reason="zram does not take $3 as its backing device"; return 1; }
    fi
    echo "$2" >"$set/disksize" || { reason="zram refuses the size $2"; return 1; }
    [ -z "${3:-}" ] || echo $(($(size_bytes "$POOL_LIMIT") - $(table_of "$DEVICE"))) >"$set/mem_limit" ||
        { reason="zram refuses its limit"; return 1; }
}

# size_bytes SIZE: as a number; of memory, if it is a part of that.
size_bytes() {
    case $1 in
        *%) mem "${1%\%}" ;;
        *) bytes "$1" ;;
    esac
}

# zram writes nothing back by itself: its documentation leaves that to a timer, and this is one. Each second,
# when the pool is fuller than three quarters, what is idle goes to the disk, that is what nobody has used since the second
# before; what does not compress first. It starts no program, for which there may be no memory.
start_writer() {
    local set=/sys/block/${DEVICE#/dev/} used most never
    (
        exec {never}<> <(:)
        while :; do
            read -r -t 1 -u "$never"
            read -r _ _ used most _ <"$set/mm_stat"
            [ "$used" -lt $((most * 3 / 4)) ] || {
                echo huge_idle >"$set/writeback"
                echo idle >"$set/writeback"
            }
            echo all >"$set/idle"
        done
    ) 2>>/tmp/writer.log &
    WRITER_OF[$1]=$!
}

# stop CONTENDER: its device goes, with what it holds.
stop() {
    local pid=${PID_OF[$1]:-} device=${DEVICE_OF[$1]:-$DEVICE} status
    stop_writer "$1"
    case $1 in
        tmem-nbd | nbdkit-zstd) [ -z "$device" ] || nbd-client -d "$device" >/dev/null 2>&1 ;;
        zram-*)
            [ -b "$device" ] && echo "${device#/dev/zram}" >/sys/class/zram-control/hot_remove
            ;;
    esac
    if [ -n "$pid" ] && kill "$pid" 2>/dev/null; then
        wait "$pid" 2>/dev/null
        status=$?
        [ "${1%%-*}" != tmem ] || [ $status = 0 ] || fail "$1: tmem ended with status $status"
    fi
    unset "PID_OF[$1]" "DEVICE_OF[$1]"
    DEVICE=''
}

stop_writer() {
    [ -n "${WRITER_OF[$1]:-}" ] || return 0
    kill "${WRITER_OF[$1]}"
    wait "${WRITER_OF[$1]}" 2>/dev/null
    unset "WRITER_OF[$1]"
}

# figure CONTENDER FIELD: of `tmem stats`, or zram's like.
figure() {
    if [ "${1%%-*}" = tmem ]; then
        tmem stats --json --control "/run/tmem/$1.sock" | tmem-guest json "total.$2"
        return
    fi
    local column
    case $2 in
        orig_data_size) column=1 ;;
        mem_used_total) column=3 ;;
        mem_used_max) column=5 ;;
    esac
    awk -v column=$column '{ print $column }' "/sys/block/${DEVICE_OF[$1]#/dev/}/mm_stat"
}

# table_of DEVICE: bytes of zram's table, which is not among its figures: 16 a page.
table_of() { echo $(($(blockdev_bytes "$1") / 4096 * 16)); }

# pool_of CONTENDER [FIELD]: bytes that it takes for pages and to find them.
pool_of() {
    local table=0
    case $1 in zram-*) table=$(table_of "${DEVICE_OF[$1]}") ;; esac
    echo $((table + $(figure "$1" "${2:-mem_used_total}")))
}

# The `status` of all processes of the daemon: there is one at a time. Some may end meanwhile.
processes_of_tmem() {
    grep -lE '^Name:[[:space:]]*tmem(-(worker|standby|preparing|logger|observer))?$' /proc/[0-9]*/status 2>/dev/null
}

# memory_of CONTENDER: bytes that it took at most, everything counted: the own pages of all processes of a daemon too, and
# the files that they map, which are the same, once; of shared memory, beside the pool, memory files that each has for itself, and the buffers
# that they have in common: 128 KiB for each request that a queue can hold.
memory_of() {
    local own=0 files queues depth
    case $1 in
        tmem-*)
            files=$(processes_of_tmem)
            own=$(awk '/^RssAnon/ { kib += $2 } /^RssFile/ && $2 > files { files = $2 }
                END { print (kib + files) * 1024 }' $files)
            own=$((own + $(cat ${files//status/smaps} | awk '/^[0-9a-f]+-/ { is_memfd = / \/memfd:/ }
                is_memfd && /^Rss:/ { kib += $2 } END { print kib * 1024 }')))
            read -r queues depth < <(tmem stats --json --control "/run/tmem/$1.sock" |
                tmem-guest json devices.0.{queues,depth})
            own=$((own + ${queues:-0} * ${depth:-0} * 131072))
            ;;
        zram-*) ;;
        *) echo 0; return ;;
    esac
    echo $(($(pool_of "$1" mem_used_max) + own))
}
