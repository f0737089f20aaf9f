# kill.sh [KILLS [SEED]]: the process that serves is killed again and again while the machine swaps on it.
#
# No page may be lost, and nobody may hang: a hang panics the guest. First at random moments under pressure by a program
# that verifies every page; then the other processes, and all that can be wrong with them.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own processes"
kills=${1:-200}
seed=${2:-1}
share=${SHARE:-160}
fill=${FILL:-heap=60,same=25,text=15}

reads() { dd if="$DEVICE" of=/dev/null bs=64k count=4 iflag=direct status=none; }

mount -t tmpfs -o size=256k tmpfs /run || give_up "cannot mount /run"
# The daemon sees what is mounted later, as on other systems.
mount --make-rshared / || give_up "cannot share mounts"
start_tmem "$(mem $((share + 5)))" 58%
wait_for 60 eval '[ -n "$(pid_of tmem-standby)" ]' || give_up "there is no standby"
# Or the kernel could swap it to us, in the moment when nobody has it mapped.
is_memfd() { ls -l "/proc/$(pid_of tmem-worker)/fd" | grep -q memfd; }
check_fails "what outlives a process is in a file that is never swapped out" is_memfd
swap_on "$DEVICE"
say "$DEVICE, $(mem 100) bytes of memory, $share % of it in use, $kills kills with seed $seed"

kill_under_pressure "$kills" "$seed" "$share" "$fill"
# Where all commands of a queue are under way, the kernel notices a death by a time limit of 30 s only.
check_number "none of them by the time limit of a request, in ms" "$(sed -n 's/.*longest_ms=//p' /tmp/kills)" -lt 30000
check_frames "after $kills kills"
check "swapoff" swapoff "$DEVICE"
check "blkdiscard" blkdiscard "$DEVICE"
check_empty "after $kills kills"
show_stats

# The others, one after the other. What is on the device has to be there each time.
pages=4096
tmem-guest device --path "$DEVICE" --pages $pages --write 1 >/tmp/device || give_up "cannot write to $DEVICE"
is_right() {
    check "$*: what was written is there" \
        tmem-guest device --path "$DEVICE" --pages $pages --read 1
}
check "there are two standbys" wait_for 60 are_standbys 2
worker=$(pid_of tmem-worker)
kill -9 $(pid_of tmem-standby)
check "standbys that are killed are replaced" wait_for 60 are_standbys 2
check_number "and the worker goes on" "$(pid_of tmem-worker)" -eq "$worker"

kill -STOP "$worker"
check "a worker that is stopped is replaced" wait_for 120 other_than tmem-worker "$worker"
is_right "stopped"
check "it is said" wait_for 20 grep "pid $worker does not serve any more" "$TMEM_LOG"

# Its queues' threads alone. Nothing that is asked for ends then, for more than a minute.
wait_for 60 are_standbys 2
worker=$(pid_of tmem-worker)
queues=$(cat "/proc/$worker"/task/*/comm | grep '^tmem-b[0-9]*q')
check_number "each processor has a queue" "$(wc -w <<<"$queues")" -eq "$(nproc)"
for queue in $queues; do
    tmem-guest hold --name tmem-worker --thread "$queue" >"/tmp/$queue.held" &
    check "$queue is held" wait_for 20 grep held "/tmp/$queue.held"
done
# Whoever waits for a page waits longer than what is otherwise taken for a hang.
limit=$(cat /proc/sys/kernel/hung_task_timeout_secs)
echo 150 >/proc/sys/kernel/hung_task_timeout_secs
is_right "stuck"
echo "$limit" >/proc/sys/kernel/hung_task_timeout_secs
check "a worker whose queues are stuck is replaced" other_than tmem-worker "$worker"
check "it is said" wait_for 20 grep "pid $worker does not serve any more" "$TMEM_LOG"

# Twice at once: by the time of the second there is no other standby yet.
wait_for 60 are_standbys 2
for death in 1 2; do
    worker=$(pid_of tmem-worker)
    kill -9 "$worker"
    check "a worker is replaced at once, time $death" wait_for 60 other_than tmem-worker "$worker"
done
is_right "twice"

# With a full /run.
wait_for 60 are_standbys 2
head -c 1M /dev/zero >/run/full 2>/dev/null
check_fails "/run is full" cp /bin/bash /run/more
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a worker is replaced while /run is full" wait_for 60 other_than tmem-worker "$worker"
check "and can be asked" wait_for 20 tmem list
check "there are two standbys, too" wait_for 60 are_standbys 2
is_right "full"
rm -f /run/full /run/more

# A device that comes and one that goes.
wait_for 60 are_standbys 2
check_code "add" 0 . tmem add swap --size 8M --name second
second=$(tmem list --noheadings --raw --output NAME,PATH | awk '$1 == "second" { print $2 }')
dd if=/dev/urandom of=/tmp/random bs=1M count=4 status=none
dd if=/tmp/random of="$second" bs=1M oflag=direct status=none
# At once: the standbys do not know of it yet.
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a worker with a new device is replaced" wait_for 60 other_than tmem-worker "$worker"
check "the new device is served" cmp -n 4194304 /tmp/random "$second"
is_right "added"
check_code "a new device is listed" 0 second tmem list
check_code "del" 0 '' tmem del second
check_number "stats tell of it" "$(stat_of takeovers)" -ge $((kills + 5))
check_number "and who serves" "$(stat_of worker_pid)" -eq "$(pid_of tmem-worker)"

# Another program. While it cannot serve, the old one goes on.
wait_for 60 are_standbys 2
program=$(command -v tmem)
cp "$program" /tmp/tmem.good
worker=$(pid_of tmem-worker)
replace() { chmod 755 "$1" && mount --bind "$1" "$program"; }
printf '#!/bin/sh\nexit 7\n' >/tmp/tmem.bad
check "a program that is none" replace /tmp/tmem.bad
check_code "is not gone on with" 1 'the old program goes on: .*exit status: 7' /tmp/tmem.good upgrade
check_number "the same process serves" "$(pid_of tmem-worker)" -eq "$worker"
is_right "not upgraded"
kill -9 "$worker"
check "and is replaced when it dies" wait_for 60 other_than tmem-worker "$worker"
wait_for 60 are_standbys 2
worker=$(pid_of tmem-worker)
check "a new program" replace /tmp/tmem.good
{ while [ ! -e /tmp/upgraded ]; do reads || break; done; touch /tmp/reads.ended; } &
check_code "is gone on with" 0 'pid [0-9]+ serves' tmem upgrade
check_fails "reads go on meanwhile" test -e /tmp/reads.ended
touch /tmp/upgraded
check "by another process" other_than tmem-worker "$worker"
for pid in "$(pid_of tmem-worker)" "$TMEM_PID"; do
    check "$(cat "/proc/$pid/comm") is of that program" [ "/proc/$pid/exe" -ef "$program" ]
done
check "there are two standbys of it" wait_for 60 are_standbys 2
is_right "upgraded"

# Without the supervisor.
wait_for 60 are_standbys 2
kill -9 "$TMEM_PID"
wait "$TMEM_PID" 2>/dev/null
is_right "alone"
check_code "which stats tell" 0 'without a supervisor' tmem stats
for death in 1 2; do
    worker=$(pid_of tmem-worker)
    kill -9 "$worker"
    check "and is replaced, time $death" wait_for 60 other_than tmem-worker "$worker"
    is_right "alone, time $death"
done
worker=$(pid_of tmem-worker)
kill -TERM "$worker"
check "it stops on a signal" wait_for 60 eval '! kill -0 $worker 2>/dev/null'
[ -b "$DEVICE" ] && fail "$DEVICE is still there" || pass "$DEVICE is gone"
check "nobody is left" wait_for 20 eval '[ -z "$(pid_of tmem-worker)$(pid_of tmem-standby)" ]'
check_code "no daemon" 3 . tmem list
finish
