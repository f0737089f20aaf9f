# kill-nbd.sh [KILLS [SEED]]: where swap is by the kernel's NBD client, the process that serves is killed again and again.
#
# Its connection ends with it, and the kernel gets another from whoever goes on. No page may be lost, no request may fail, and
# nobody may hang: a hang panics the guest. Then all the other ways in which the connection changes hands.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own processes"
kills=${1:-20}
seed=${2:-1}
export FRONTEND=nbd

# What the kernel's client says of a request that it has given up.
errors() { dmesg | grep -cE 'nbd[0-9]+.*(I/O error|Connection timed out|Other side returned error)|Read-error on swap|Write-error on swap'; }
two_wait() { wait_for 60 are_standbys 2; }
reads() { dd if="$DEVICE" of=/dev/null bs=64k count=4 iflag=direct status=none; }

mount --make-rshared / || give_up "cannot share mounts"
echo 0 >/proc/sys/vm/watermark_boost_factor
echo 16384 >/proc/sys/vm/min_free_kbytes
start_tmem "$(mem 165)" 58% --swapon
check "the device is the kernel's client" eval '[[ $DEVICE == /dev/nbd* ]]'
check "two wait to go on" two_wait
say "$DEVICE, $(mem 100) bytes of memory, $kills kills with seed $seed"
echo 0 >/proc/sys/vm/page-cluster

kill_under_pressure "$kills" "$seed" 150 heap=60,same=25,text=15
check_number "no request has failed" "$(errors)" -eq 0
check_frames "after $kills kills"
check_number "there is one connection" "$(tmem list --noheadings --raw --output CONNECTIONS)" -eq 1
check "swapoff" swapoff "$DEVICE"
check "blkdiscard" blkdiscard "$DEVICE"
check_empty "after $kills kills"

# What is on the device has to be there each time.
pages=2048
tmem-guest device --path "$DEVICE" --pages $pages --write 1 >/tmp/device || give_up "cannot write to $DEVICE"
is_right() {
    check "$*: what was written is there" tmem-guest device --path "$DEVICE" --pages $pages --read 1
}

say "-- a connection that ends while the process lives"
worker=$(pid_of tmem-worker)
before=$(dmesg | grep -c "$DEVICE has another connection")
for time in 1 2 3; do
    { for ((i = 0; i < 20; i++)); do reads || exit 1; done; } &
    reader=$!
    check "it is cut, time $time" tmem-guest hangup --name tmem-worker
    wait $reader
    check_number "who reads goes on, time $time" $? -eq 0
    is_right "cut, time $time"
done
check_number "the kernel has got another each time" \
    $(($(dmesg | grep -c "$DEVICE has another connection") - before)) -ge 3
check_number "by the same process" "$(pid_of tmem-worker)" -eq "$worker"

say "-- a process that does not run"
check "two wait to go on" two_wait
worker=$(pid_of tmem-worker)
kill -STOP "$worker"
check "it is replaced" wait_for 120 other_than tmem-worker "$worker"
is_right "stopped"

say "-- another program"
check "two wait to go on" two_wait
worker=$(pid_of tmem-worker)
{ while [ ! -e /tmp/upgraded ]; do reads || break; done; touch /tmp/reads.ended; } &
check_code "is gone on with" 0 'pid [0-9]+ serves' tmem upgrade
check_fails "reads go on meanwhile" test -e /tmp/reads.ended
touch /tmp/upgraded
wait_for 20 test -e /tmp/reads.ended
check "by another process" other_than tmem-worker "$worker"
is_right "upgraded"

say "-- a device that the standbys do not know"
check "two wait to go on" two_wait
check_code "add" 0 /dev/nbd tmem add swap --size 8M --name second
second=$(tmem list --noheadings --raw --output NAME,PATH | awk '$1 == "second" { print $2 }')
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a worker with a new device is replaced" wait_for 60 other_than tmem-worker "$worker"
check "the new device is swapped on still" grep -q "^$second" /proc/swaps
check_code "and can be removed" 0 '' tmem del second
check_fails "and is disconnected" test -e "/sys/block/${second#/dev/}/pid"
is_right "added"

say "-- a device that somebody disconnects"
check "two wait to go on" two_wait
check_code "add" 0 /dev/nbd tmem add swap --size 8M --name third
third=$(tmem list --noheadings --raw --output NAME,PATH | awk '$1 == "third" { print $2 }')
swapoff "$third"
nbd-client -d "$third"
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a worker is replaced" wait_for 60 other_than tmem-worker "$worker"
check "it is said" wait_for 20 grep "'third' is gone" "$TMEM_LOG"
check_fails "it is not listed" eval 'tmem list | grep third'
is_right "disconnected"

check_code "another device gets its number" 0 "$third" tmem add swap --size 8M --name fourth
check "two wait to go on" two_wait
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a worker is replaced" wait_for 60 other_than tmem-worker "$worker"
check "which is swapped on still" grep -q "^$third" /proc/swaps
check_code "and listed" 0 "fourth.*$third" tmem list
is_right "another"
swapoff "$third"
nbd-client -d "$third"
check "two wait to go on" two_wait
before=$(pid_of tmem-standby)
check_code "one that was disconnected can be removed" 0 '' tmem del fourth
check "two others wait to go on" wait_for 60 others_wait "$before"

say "-- all processes die"
all_die
reads >/tmp/reads 2>&1 &
reader=$!
check_code "a new daemon would forget everything" 5 'tmem recover' tmem run --swap 32M
check "a read waits" kill -0 $reader
tmem recover >/tmp/tmem.out 2>>"$TMEM_LOG" &
TMEM_PID=$!
check "another goes on" wait_for 60 eval '[ -n "$(pid_of tmem-worker)" ]'
wait $reader
check_number "and the read ends well" $? -eq 0
is_right "recovered"
check_number "no request has failed" "$(errors)" -eq 0
check "two wait to go on" two_wait
stop_tmem
check_fails "the device is disconnected" test -e "/sys/block/${DEVICE#/dev/}/pid"
check_number "and is for others as it was" "$(cat "/sys/block/${DEVICE#/dev/}/queue/io_timeout")" -eq 30000
finish
