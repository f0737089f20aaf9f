# demo.sh: what `scripts/run` shows: swap on tmem under a program that needs more memory than it gets.
#
# In a guest the program has the whole machine, and wants half as much memory again. On a host
# (scripts/run as root, with ublk) it gets a memory cgroup of its own, so that nothing else is put
# under pressure. Either way it verifies every page, and the figures are of the moment when all its
# pages are written. Ends with 0 only if every page was right and swap was really used.

. "$(dirname "$0")/lib.sh"
exec 2>&1
work=$(mktemp -d)
go=$work/go log=$work/pressure
trap 'rm -rf "$work"' EXIT

if [ -n "${TMEM_GUEST:-}" ]; then
    size=$(mem 160) limit=50% memory=$(mem 150)
    say "the machine has $(($(mem 100) >> 20)) MiB of memory, the program wants $((memory >> 20)) MiB"
else
    size=$(bytes 1G) limit=512M memory=$(bytes 512M)
    say "the program gets 256 MiB of memory, and wants 512 MiB"
fi

# In the guest the whole machine is the group.
confined() {
    if [ -n "${TMEM_GUEST:-}" ]; then exec "$@"; fi
    local group=/sys/fs/cgroup/tmem-demo
    mkdir -p $group && bytes 256M >$group/memory.max && echo $BASHPID >$group/cgroup.procs ||
        { echo "cannot make the memory cgroup $group: is cgroup v2 mounted there?"; exit 1; }
    exec "$@"
}

vmstat_of() { awk -v name="$1" '$1 == name { print $2 }' /proc/vmstat; }
mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }

start_tmem "$size" "$limit" --swapon
say "swap is on $DEVICE: $(grep "^$DEVICE" /proc/swaps | tr -s ' \t' ' ')"
out_before=$(vmstat_of pswpout) in_before=$(vmstat_of pswpin)
(confined tmem-guest pressure --memory "$memory" --seed "${SEED:-1}" --touches 0.5 --fill heap=60,same=25,text=15 --until "$go" >"$log") &
program=$!
show_progress() {
    while sleep 10; do
        say "so far $(($(vmstat_of pswpout) - out_before)) pages out, $(($(vmstat_of pswpin) - in_before)) in"
    done
}
show_progress &
progress=$!
wait_for 1500 eval 'grep -q waiting "$log" || ! kill -0 $program 2>/dev/null'

tmem stats --json >"$work/stats" || fail "no figures"
figure() { tmem-guest json "total.$1" <"$work/stats"; }
tmem stats
data=$(figure orig_data_size) compressed=$(figure compr_data_size) used=$(figure mem_used_total)
touch "$go"
wait $program
status=$?
kill $progress
wait $progress 2>/dev/null
out=$(($(vmstat_of pswpout) - out_before)) in=$(($(vmstat_of pswpin) - in_before))
check_number "the program ran to its end, every page right" $status -eq 0
check_number "pages were swapped out" "$out" -gt 1000
check_number "pages were swapped in" "$in" -gt 1000
check_number "bytes stored are fewer than came" "$used" -lt "$data"
stop_tmem
[ -n "${TMEM_GUEST:-}" ] || rmdir /sys/fs/cgroup/tmem-demo

verified=$(sed -n 's/^pressure: .*verified=\([0-9]*\).*/\1/p' "$log")
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", b ? a / b : 0 }'; }
cat <<EOF

  pages out              $out
  pages in               $in
  swapped at the peak    $(mib "$data")
  compressed to          $(mib "$compressed")  (ratio $(ratio "$data" "$compressed"))
  memory it took in all  $(mib "$used")  (ratio $(ratio "$data" "$used"))
  memory saved           $(mib $((data - used)))
  pages verified         ${verified:-0}

EOF
finish
