# recover.sh [private]: the process that looks after the others dies, or all of them, where there is no systemd, and
# `tmem recover` goes on. A program is swapped out in part all the time, and verifies its pages at the end.
#
# With `private`, mounts are not shared between mount namespaces: the kernel's default, and not systemd's.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own processes"
[ "${1:-}" = private ] && how=--make-rprivate || how=--make-rshared
mount $how / || give_up "cannot $how"
keep=/run/tmem/control.sock.pages

swapped_on() { awk 'NR > 1 && $1 ~ "ublkb" { print $1 }' /proc/swaps | sort | tr '\n' ' '; }
swap_used() { awk 'NR > 1 { used += $4 } END { print used + 0 }' /proc/swaps; }
shmem() { awk '/^Shmem:/ { print $2 }' /proc/meminfo; }
parent_of() { awk '{ print $4 }' "/proc/$1/stat"; }
# All of ours, the one that looks after them first.
our_own() {
    local pid
    for pid in $(pid_of tmem-worker) $(pid_of tmem-standby); do
        [ "$(parent_of "$pid")" = "$TMEM_PID" ] || return 1
    done
    are_standbys 2 && [ -n "$(pid_of tmem-worker)" ]
}
recover() {
    tmem recover >/tmp/tmem.out 2>>"$TMEM_LOG" &
    TMEM_PID=$!
    check "$1: one serves, and two wait to go on" wait_for 60 our_own
    check_code "$1: it can be asked" 0 ublkb tmem list
}
nothing_is_left() {
    check_fails "$1: the name is gone" test -e $keep
    check_fails "$1: and the mount" grep -q $keep /proc/self/mountinfo
    # A namespace that nobody is in keeps none of it.
    check_number "$1: and the memory, in KiB" "$(shmem)" -lt $((before + 2048))
}

before=$(shmem)
check_code "where nothing was there is nothing to recover" 3 'has left anything' tmem recover
start_tmem 160M 64M --swapon
check "two wait to go on" wait_for 60 our_own
check "what outlives the processes has a name" test -f $keep/store
check "that is root's alone" [ "$(stat -c '%U %a' $keep $keep/store | tr '\n' ' ')" = "root 700 root 600 " ]
check_code "one that is looked after is left alone" 10 'nothing to recover' tmem recover
check_code "a second one is refused" 10 'another tmem daemon' tmem run --swap 32M

group=/sys/fs/cgroup/program
mkdir $group && bytes 16M >$group/memory.high || give_up "there is no memory cgroup"
(echo $BASHPID >$group/cgroup.procs && exec tmem-guest pressure --memory "$(bytes 48M)" --fill heap=60,same=25,text=15 \
    --touches 0 --until /tmp/go) >/tmp/program 2>&1 &
program=$!
check "a program is swapped out" wait_for 120 grep -q filled /tmp/program
check_number "in part, in KiB" "$(swap_used)" -gt 8192

say "-- the supervisor dies"
kill -9 "$TMEM_PID"
wait "$TMEM_PID" 2>/dev/null
check_code "stats tell" 0 'without a supervisor' tmem stats
# Two at once: one of them it is.
tmem recover >/tmp/other.out 2>/tmp/other.log &
other=$!
tmem recover >/tmp/tmem.out 2>>"$TMEM_LOG" &
TMEM_PID=$!
check "of two one is refused" wait_for 60 eval '! kill -0 $other 2>/dev/null || ! kill -0 $TMEM_PID 2>/dev/null'
kill -0 "$TMEM_PID" 2>/dev/null || { mv /tmp/other.log "$TMEM_LOG"; TMEM_PID=$other; }
check "the other goes on" wait_for 60 our_own
tmem stats >/tmp/stats
check "it serves, after another" grep -q 'served: by pid .* in the place of' /tmp/stats
check_fails "and has a supervisor" grep -q 'without a supervisor' /tmp/stats
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "a death is survived as ever" wait_for 60 other_than tmem-worker "$worker"

say "-- all die"
check "two wait to go on" wait_for 60 our_own
all_die
check_code "a new daemon would forget everything" 5 "tmem recover.*rm $keep/store" tmem run --swap 32M
recover "all died"
check "swap has its name" [ "$(swapped_on)" = "$DEVICE " ]
check_code "there may be more swap" 0 ublkb tmem add swap --size 16M
both=$(swapped_on)
check_number "there is" "$(wc -w <<<"$both")" -eq 2
check_code "it may be upgraded" 0 'pid [0-9]+ serves' tmem upgrade
check "two wait to go on" wait_for 60 our_own
all_die
recover "all died again"
check "both have their names" [ "$(swapped_on)" = "$both" ]
touch /tmp/go
wait $program
check_number "the program ends well" $? -eq 0
check "every page is right" grep -q ' errors=0 ' /tmp/program
stop_tmem
check "nothing is swapped on" [ -z "$(swapped_on)" ]
nothing_is_left "stopped"

say "-- an end without a supervisor"
start_tmem 32M 32M
check "two wait to go on" wait_for 60 our_own
kill -9 "$TMEM_PID"
wait "$TMEM_PID" 2>/dev/null
worker=$(pid_of tmem-worker)
kill -TERM "$worker"
check "who serves ends when told to" wait_for 60 eval '! kill -0 $worker 2>/dev/null'
wait_for 20 eval '[ -z "$(pid_of tmem-standby)" ]'
nothing_is_left "alone"

say "-- a start that fails"
check_code "of a device that is too large" 8 . tmem run --swap 1E
nothing_is_left "not started"

say "-- a backing file that is not there"
[ -b /dev/vdb ] || give_up "needs a disk: scripts/vm --disk 128M"
start_tmem 32M 32M --backing /dev/vdb
check "two wait to go on" wait_for 60 our_own
dd if=/dev/urandom of=/tmp/random bs=1M count=4 status=none
dd if=/tmp/random of="$DEVICE" bs=1M oflag=direct status=none
all_die
mv /dev/vdb /dev/away
check_code "nothing is lost for it" 1 'cannot open /dev/vdb.*--without-backing' tmem recover
mv /dev/away /dev/vdb
recover "backed"
check "what was written is there" cmp -n 4194304 /tmp/random "$DEVICE"
rm /tmp/random
stop_tmem
nothing_is_left "backed"

say "-- thrown away"
start_tmem 32M 32M
check "two wait to go on" wait_for 60 our_own
all_die
check "what is thrown away is gone" rm $keep/store
start_tmem 32M 32M
check "it says what may be lost" wait_for 20 grep 'has no server any more' "$TMEM_LOG"
stop_tmem
nothing_is_left "thrown away"
finish
