# user-side.sh: what a person types, on real devices: run, add, del, list, stats, set, and the stop.
#
# Exit codes are those that `tmem --help` lists. A device that somebody else swaps to is never pulled
# away, whether it is to be removed or the daemon to be stopped.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own command line"

path_of() { tmem list --noheadings --raw --output NAME,PATH | awk -v name="$1" '$1 == name { print $2 }'; }

# A mkswap that tells how it was started.
mkdir -p /tmp/bin
cat >/tmp/bin/mkswap <<'EOF'
#!/bin/bash
cut -d' ' -f9 /proc/self/stat >/tmp/mkswap.flags
sed -n 's/^SigBlk:[[:space:]]*//p' /proc/self/status >/tmp/mkswap.blocked
exec /usr/sbin/mkswap "$@"
EOF
chmod +x /tmp/bin/mkswap

PATH=/tmp/bin:$PATH start_tmem 64M,name=first 64M --swapon
check_number "programs do not inherit the I/O flusher's flags" $(($(cat /tmp/mkswap.flags) & 0x180000)) -eq 0
check_number "nor blocked signals" $((16#$(cat /tmp/mkswap.blocked))) -eq 0
check "swapped on with priority 100" eval 'grep -qE "^$DEVICE .* 100$" <(tr -s "\t " " " </proc/swaps)'
for process in "$TMEM_PID" "$(pid_of tmem-worker)"; do
    for signal in TSTP USR1 ALRM; do kill -$signal "$process"; done
    check_fails "it is neither stopped nor ended by other signals" grep -E '^State:.*[TZ]' "/proc/$process/status"
done
check "and serves on" dd if="$DEVICE" of=/dev/null bs=64k count=4 iflag=direct status=none
check_code "a second daemon" 10 'another|already|serves' tmem run --swap 64M
check_code "add" 0 . tmem add swap --size 32M --name second
second=$(path_of second)
check "the new device is there, with its size" eval '[ "$(blockdev_bytes $second)" = 33554432 ]'
check_code "add a name twice" 7 second tmem add swap --size 32M --name second
check_code "add no size" 8 . tmem add swap --size 0
check_code "add an odd size" 8 4096 tmem add swap --size 33554433
check_code "add a size beyond all" 8 . tmem add swap --size 64T
check_code "set" 0 . tmem set pool-limit=48M
check_number "the limit is set" "$(stat_of mem_limit)" -eq $((48 << 20))
check_code "set an unknown key" 2 'pool-limit' tmem set colour=blue
check_code "set a limit below the reserve" 8 . tmem set pool-limit=4K
check_code "set a limit above memory" 8 . tmem set pool-limit=100G
check_code "list" 0 second tmem list
check_code "stats" 0 second tmem stats
check_code "doctor" 0 ublk tmem doctor

check "a device added later is swapped on too, and filled later" \
    eval 'grep -qE "^$second .* 99$" <(tr -s "\t " " " </proc/swaps)'
check_code "del swaps off what the daemon swapped on" 0 '' tmem del second
[ -b "$second" ] && fail "$second is still there" || pass "$second is gone"
stop_tmem

start_tmem 64M,name=first 64M
check_code "add without --swapon" 0 . tmem add swap --size 32M --name second
second=$(path_of second)
dd if=/dev/urandom of="$second" bs=1M count=8 oflag=direct status=none
check_number "its data counts" "$(tmem stats --json | tmem-guest json devices.1.orig_data_size)" -eq $((8 << 20))
mkfs.ext4 -q "$second" && mount "$second" /mnt || give_up "cannot mount $second"
check_code "del of what is mounted" 5 'umount /mnt' tmem del second
umount /mnt
check_code "del" 0 '' tmem del second
check_code "del what is not there" 6 second tmem del second
check_number "its data went with it" "$(stat_of orig_data_size)" -lt $((1 << 20))

# Somebody else's swap.
check_code "add a third" 0 . tmem add swap --size 32M --name third
third=$(path_of third)
mkswap "$third" >/dev/null && swapon "$third" || give_up "cannot swap on $third"
check_code "del while others swap to it" 5 "swapoff $third" tmem del third
kill -TERM "$TMEM_PID"
sleep 3
check "a stop is refused while others swap to a device" kill -0 "$TMEM_PID"
check "and says who, and what to do" wait_for 20 grep "swapoff $third" "$TMEM_LOG"
check "the device still works" dd if="$third" of=/dev/null bs=64k count=4 iflag=direct status=none
swapoff "$third"
check "once they are done it stops by itself" wait_for 60 eval '! kill -0 $TMEM_PID 2>/dev/null'
wait "$TMEM_PID"
check_number "and ends well" $? -eq 0
[ -b "$third" ] && fail "$third is still there" || pass "$third is gone"

start_tmem 32M 32M
check "a stale socket does not hinder a start" tmem list
stop_tmem
check_code "no daemon" 3 . tmem list
finish
