# systemd.sh [beyond]: tmem as a service of a Debian that systemd has booted: start, pressure, a sudden end, stop, shutdown.
#
# Run by scripts/vm --system, which powers the machine off afterwards and looks at how that goes: this script leaves
# swap in use; with `beyond`, more than there is memory to swap off to.

. "$(dirname "$0")/lib.sh"

property() { systemctl show --property "$2" --value "$1"; }
is() { [ "$(property "$1" "$2")" = "$3" ]; }
check_is() { check "$1: $2=$3" is "$@"; }
swapped_on() { awk 'NR > 1 && $1 ~ "^/dev/ublkb" { print $1 }' /proc/swaps; }
# In KiB.
swap_used() { awk 'NR > 1 { used += $4 } END { print used + 0 }' /proc/swaps; }
vmstat_of() { awk -v name="$1" '$1 == name { print $2 }' /proc/vmstat; }
main_pid() { property tmem MainPID; }
status_of() { sed -n "s/^$1:[[:space:]]*//p" "/proc/$(main_pid)/status"; }

# hog NAME BYTES SETTINGS...: a service whose program takes so much memory, and verifies it once /tmp/NAME.go is there.
# (With MemoryHigh=, who takes more waits until it is swapped out. At MemoryMax= the kernel counts attempts, not time, before
# it kills, and an emulated processor that has to do the swapping out may stand still meanwhile.)
hog() {
    local name=$1 memory=$2
    shift 2
    systemd-run --quiet --unit "$name" --property RemainAfterExit=yes "$@" --property StandardOutput="append:/tmp/$name.log" \
        --property StandardError="append:/tmp/$name.log" \
        tmem-guest pressure --memory "$memory" --fill heap=60,same=25,text=15 --touches 0 --until "/tmp/$name.go"
    wait_for 120 grep -qE 'filled|rror' "/tmp/$name.log"
    grep -q filled "/tmp/$name.log" && return
    cat "/tmp/$name.log" /proc/swaps
    dmesg | grep -A60 'invoked oom-killer' | tail -80
    show_stats
    give_up "$name does not get its memory: $(systemctl status "$name")"
}
hog_is_right() {
    local name=$1
    touch "/tmp/$name.go"
    wait_for 120 is "$name" SubState exited || fail "$name does not end: $(property "$name" SubState)"
    check_is "$name" Result success
    check "$name: every page is right" grep -q ' errors=0 ' "/tmp/$name.log"
    systemctl stop "$name"
}

say "-- start"
check "the system is up, and no unit has failed" [ -z "$(systemctl --failed --no-legend)" ]
check_is tmem ActiveState active
check_is tmem Result success
check_is tmem NRestarts 0
check "it said that it is ready, and what it does" [ "$(property tmem StatusText)" = "serving 1 devices" ]
check "swap is on ublk" [ "$(swapped_on)" = /dev/ublkb0 ]
check "it was there before swap.target was reached" [ "$(property tmem ActiveEnterTimestampMonotonic)" -le \
    "$(property swap.target ActiveEnterTimestampMonotonic)" ]
check "no watchdog may kill it" grep -qx "0\|infinity" <(property tmem WatchdogUSec)
check "the journal has no complaint" [ -z "$(journalctl -u tmem --no-pager -o cat | grep -E 'guard|cannot|warning')" ]
check "its settings are the distribution's" grep -q 'swapon = true  # /usr/lib/tmem/tmem.toml' <(tmem config)
check "there are two processes that wait to go on" wait_for 60 are_standbys 2
for pid in $(main_pid) $(pid_of tmem-worker) $(pid_of tmem-standby); do
    check "$(cat "/proc/$pid/comm"): its name tells systemd-shutdown to leave it" [ "$(head -c 5 "/proc/$pid/cmdline")" = @tmem ]
    check "and the OOM killer leaves it" [ "$(cat "/proc/$pid/oom_score_adj")" = -1000 ]
done
is_memfd() { ls -l "/proc/$(pid_of tmem-worker)/fd" | grep -q memfd; }
check_fails "what outlives a process is in a file that is never swapped out" is_memfd
# Field 41 is the scheduling policy: 2 is SCHED_RR.
check "who waits may become real-time, for the kernel's reserve of memory" \
    wait_for 20 awk '$41 != 2 { exit 1 }' $(pid_of tmem-standby | sed 's#.*#/proc/&/stat#')
check "it has the five capabilities and no other" [ "$(status_of CapEff)" = 0000000401a04000 ]
check "system calls are filtered" [ "$(status_of Seccomp)" = 2 ]
check "it has no limit on locked memory" [ "$(status_of VmLck | tr -dc 0-9)" -gt 1000 ]
check "it is beside all slices" [ "$(property tmem ControlGroup)" = /tmem.service ]
check "and none of it is swapped" [ "$(cat /sys/fs/cgroup/tmem.service/memory.swap.max)" = 0 ]
check "its control socket is root's alone" [ "$(stat -c '%U %a' /run/tmem/control.sock)" = "root 600" ]
check_code "the command line reaches it" 0 swap0 tmem list
depth=$(tmem list --noheadings --raw --output DEPTH)
check_number "a queue has one request less than it has room for" "$(cat /sys/block/ublkb0/queue/nr_requests)" -eq $((depth - 1))

is_freed_kept() { journalctl -u tmem --no-pager -o cat | grep 'kept until it is written over'; }
check_fails "and it sees what swap the kernel frees" is_freed_kept

say "-- pressure"
before=$(vmstat_of pswpout)
hog first "$(bytes 40M)" --property MemoryHigh=16M
hog_is_right first
check_number "pages were swapped out" $(($(vmstat_of pswpout) - before)) -gt 4000
check_is tmem NRestarts 0
check_frames "after pressure"

say "-- stop with swap in use"
hog stopped "$(bytes 48M)" --property MemoryHigh=16M
check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
pid=$(main_pid)
# What was swapped needs room: the limit was there to have it swapped.
systemctl set-property --runtime stopped MemoryHigh=infinity
check "it stops" systemctl stop tmem
check_is tmem ActiveState inactive
check_is tmem Result success
check "nothing is swapped on" [ -z "$(swapped_on)" ]
check_fails "the process has ended" test -d "/proc/$pid"
check "and the others" [ -z "$(pid_of tmem-worker)$(pid_of tmem-standby)" ]
check_fails "and its device is gone" test -e /dev/ublkb0
hog_is_right stopped
check "it starts again" systemctl start tmem
check "and swap is on" [ -n "$(swapped_on)" ]

say "-- a sudden end of the process that serves"
hog killed "$(bytes 40M)" --property MemoryHigh=16M
check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
pid=$(main_pid)
for death in 1 2; do
    [ $death = 1 ] || touch /tmp/killed.go
    check "two wait to go on" wait_for 60 are_standbys 2
    worker=$(pid_of tmem-worker)
    kill -9 "$worker"
    check "another goes on, time $death" wait_for 60 other_than tmem-worker "$worker"
done
hog_is_right killed
check_is tmem ActiveState active
check_is tmem NRestarts 0
check_is tmem MainPID "$pid"
check "two wait to go on" wait_for 60 are_standbys 2
check "those that came later are left by systemd-shutdown, too" [ -z "$(grep -Lz ^@tmem $(
    pid_of tmem-worker | sed 's#.*#/proc/&/cmdline#'
    pid_of tmem-standby | sed 's#.*#/proc/&/cmdline#'
))" ]

say "-- a sudden end of the one that looks after it"
hog alone "$(bytes 40M)" --property MemoryHigh=16M
check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
pid=$(main_pid)
systemctl kill --kill-who=main -s KILL tmem
has_another() { is tmem ActiveState active && [ "$(main_pid)" != 0 ] && [ "$(main_pid)" != "$pid" ]; }
check "systemd starts another" wait_for 120 has_another
worker_is_its_own() { [ "$(awk '{ print $4 }' "/proc/$(pid_of tmem-worker)/stat")" = "$(main_pid)" ]; }
check "which has a process of its own go on" wait_for 120 worker_is_its_own
check "and two that wait, and no other" wait_for 120 are_standbys 2
hog_is_right alone
check_is tmem NRestarts 1
check "it can be asked" wait_for 60 eval 'tmem stats | grep "served: by pid $(pid_of tmem-worker)"'
check_fails "it has a supervisor" grep "without a supervisor" <(tmem stats)
check "freed swap is seen by the process that has been asked since the start" [ "$(ls /run/tmem/control.sock.freed-* | wc -l)" = 1 ]
check_fails "and by who goes on, whose network is another" is_freed_kept
hog seen "$(bytes 40M)" --property MemoryHigh=16M
hog_is_right seen
check "which flushes what a program has freed" wait_for 30 eval '[ "$(stat_of freed_pages)" -gt 1000 ]'

say "-- a sudden end of all"
hog orphaned "$(bytes 40M)" --property MemoryHigh=16M
check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
pid=$(main_pid)
systemctl kill --kill-who=all -s KILL tmem
check "systemd starts it again" wait_for 120 has_another
check "it goes on with what was swapped" wait_for 120 worker_is_its_own
hog_is_right orphaned
check_is tmem NRestarts 2
check "swap is on the same device" [ "$(swapped_on)" = /dev/ublkb0 ]
check "two wait to go on" wait_for 60 are_standbys 2

say "-- upgrade"
hog upgraded "$(bytes 40M)" --property MemoryHigh=16M
check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
pid=$(main_pid) worker=$(pid_of tmem-worker)
cp /usr/bin/tmem /usr/bin/tmem.new
mv /usr/bin/tmem.new /usr/bin/tmem
check "systemctl reload" systemctl reload tmem
check_is tmem ActiveState active
check_is tmem MainPID "$pid"
check "another process serves" [ "$(pid_of tmem-worker)" != "$worker" ]
is_of_new() { [ "$(stat -Lc %i "/proc/$1/exe")" = "$(stat -c %i /usr/bin/tmem)" ]; }
check "it is of the new program" is_of_new "$(pid_of tmem-worker)"
check "and so is the one that looks after it" is_of_new "$(main_pid)"
check "two wait to go on" wait_for 60 are_standbys 2
hog_is_right upgraded

say "-- stop, after all that"
check "it stops" systemctl stop tmem
check_is tmem Result success
check "nothing is swapped on" [ -z "$(swapped_on)" ]
check "systemd keeps nothing" [ "$(property tmem NFileDescriptorStore)" = 0 ]
check "it starts again" systemctl start tmem
check_is tmem NRestarts 0
check "and swap is on" [ -n "$(swapped_on)" ]

say "-- a configuration that is wrong"
# There have been some starts by now, and no more than five in a minute are allowed.
systemctl reset-failed tmem
mkdir -p /etc/tmem/tmem.toml.d
echo 'pool-limt = "1G"' >/etc/tmem/tmem.toml.d/typo.toml
check_fails "a restart fails" systemctl restart tmem
check_is tmem ExecMainStatus 2
check "it is not tried again and again" is tmem ActiveState failed
check "and the journal says where" wait_for 20 eval "journalctl -u tmem --no-pager -o cat | grep 'typo.toml: line 1'"
rm /etc/tmem/tmem.toml.d/typo.toml
check "it starts when it is mended" systemctl start tmem

say "-- shutdown with swap in use"
# A program that nobody stops until the very end (as those of the initrd) is swapped out in part.
outlasting=(--property DefaultDependencies=no --property OOMScoreAdjust=-900 --property IgnoreOnIsolate=yes)
if [ "${1:-}" != beyond ]; then
    hog last "$(bytes 48M)" "${outlasting[@]}" --property MemoryHigh=16M
    systemctl set-property --runtime last MemoryHigh=infinity
    check_number "swap is in use, in KiB" "$(swap_used)" -gt 8192
    finish
fi
# Or it has more than memory: swapping off fails as long as it is there. systemd has to go on without it, and the daemon to
# serve to the end. (In one of some five runs, on a machine that did much else, the guest hung when only that program was left.)
mkdir -p /run/systemd/system/tmem.service.d
printf '[Service]\nTimeoutStopSec=8\n' >/run/systemd/system/tmem.service.d/short.conf
systemctl daemon-reload
hog last "$(mem 108)" "${outlasting[@]}"
check_number "more is swapped than fits, in KiB" "$(swap_used)" -gt 16384
finish
