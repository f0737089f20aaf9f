# freed.sh [PART...]: pages of swap that the kernel frees are not kept, though it does not discard them.
#
#   places     single places are freed while others around them are in use, under pressure
#   heirs      a process that goes on after another's death sees it as well, and so does the next; and all is right without
#   strangers  swap elsewhere, and a swap file on a device of ours, frees nothing of ours
#   exported   nothing is flushed of a device that others can reach
#
# Swap is switched on without discards, so that nothing else can tell of what is free. Needs a disk for swap that is not
# ours: scripts/vm --mem 256M --disk 256M. What is on it is lost.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "zram is told by the kernel itself"
cd /tmp || give_up "there is no /tmp"
disk=/dev/vdb
[ -b $disk ] || give_up "needs a second disk: scripts/vm --disk 256M"

# Clusters are not discarded, and readahead does not come between.
swap_on_silently() {
    mkswap "$1" >/dev/null 2>&1 || give_up "mkswap $1"
    swapon --priority "${2:-100}" "$1" || give_up "swapon $1"
    echo 0 >/proc/sys/vm/page-cluster
}

# used DEVICE: bytes that the kernel has swapped to it.
used() { awk -v device="$1" '$1 == device { print $4 * 1024 }' /proc/swaps; }

# What is held is what the kernel uses, and at most 1 MiB more: the area's header, and what is just being freed.
holds_what_is_used() { [ "$(stat_of orig_data_size)" -le $(($(used "$DEVICE") + 1048576)) ]; }
check_held() { check "$1: no more is held than is in use" wait_for 30 holds_what_is_used; }

# hold_pages BYTES: a program that has so much and reads a part of it again and again until let_pages_go.
hold_pages() {
    touch /tmp/holding
    : >/tmp/held
    tmem-guest pressure --memory "$1" --seed 11 --while /tmp/holding --touches 0.01 >/tmp/held 2>&1 &
    holder=$!
    check "the holder has its pages" wait_for 60 grep -q 'filled' /tmp/held
}
let_pages_go() {
    rm /tmp/holding
    wait $holder
    check_number "$1: the holder's pages are right" $? -eq 0
    check "$1: and all were verified" grep '^pressure: .* errors=0 ' /tmp/held
}

part_places() {
    local round
    start_tmem 320M 96M
    check_fails "places: nobody says that freed swap is kept" grep 'kept until it is written over' "$TMEM_LOG"
    swap_on_silently "$DEVICE"
    pressure "places: every page is right" --memory 110% --seed 1 --touches 0.2
    check "places: flushed because it was freed" wait_for 30 eval '[ "$(stat_of freed_pages)" -gt 5000 ]'
    check_held places
    hold_pages "$(mem 50)"
    for round in 2 3 4; do
        pressure "places: every page is right beside the holder's, round $round" --memory 60% --seed $round --touches 0.2
        check_held "places, round $round"
    done
    let_pages_go places
    check_held "places, at the end"
    check_number "places: no discard was needed" "$(stat_of flush_total)" -eq 0
    check "places: swapoff" swapoff "$DEVICE"
    check "places: nothing is left but the header" wait_for 30 eval '[ "$(stat_of orig_data_size)" -le 8192 ]'
    check_frames places
    check "places: one process observes" one_observes
    stop_tmem
    check "places: it has ended" wait_for 20 nobody_observes
}

one_observes() { [ "$(pid_of tmem-observer | wc -l)" = 1 ]; }
nobody_observes() { [ -z "$(pid_of tmem-observer)" ]; }

# All that was ever swapped fits the pool: what was freed around a death, when nobody looked, is held until it is written over.
part_heirs() {
    local death worker observer
    start_tmem 200M 96M
    swap_on_silently "$DEVICE"
    check "heirs: there are two standbys" wait_for 60 are_standbys 2
    check "heirs: one process observes" one_observes
    observer=$(pid_of tmem-observer)
    hold_pages "$(mem 50)"
    kill_under_pressure 5 1 60 heap=60,same=25,text=15
    let_pages_go heirs
    for death in 1 2; do
        check "heirs: the same process observes, time $death" eval '[ "$(pid_of tmem-observer)" = "$observer" ]'
        pressure "heirs: every page is right, time $death" --memory 105% --seed $((4 + death)) --touches 0.2
        check "heirs: what is freed is flushed, time $death" wait_for 30 eval '[ "$(stat_of freed_pages)" -gt 2000 ]'
        worker=$(pid_of tmem-worker)
        kill -9 "$worker"
        check "heirs: another goes on, time $death" wait_for 60 other_than tmem-worker "$worker"
        check "heirs: and has two standbys, time $death" wait_for 60 are_standbys 2
    done
    check_fails "heirs: nobody says that freed swap is kept" grep 'kept until it is written over' "$TMEM_LOG"
    # A device that an heir makes in the place of another has an observer of its own.
    check "heirs: swapoff of the first device" swapoff "$DEVICE"
    check_code "heirs: which is removed" 0 '' tmem del "$(awk 'NR == 1 { print $1 }' /tmp/tmem.out)"
    check "heirs: and nobody observes it" wait_for 20 nobody_observes
    check_code "heirs: another device" 0 /dev/ublkb tmem add swap --size 200M
    DEVICE=$(tmem list --noheadings --raw --output PATH)
    swap_on_silently "$DEVICE"
    check "heirs: is observed" one_observes
    check "heirs: by another" other_than tmem-observer "$observer"
    observer=$(pid_of tmem-observer)
    check "heirs: there are two standbys again" wait_for 60 are_standbys 2
    worker=$(pid_of tmem-worker)
    kill -9 "$worker"
    check "heirs: another goes on with it" wait_for 60 other_than tmem-worker "$worker"
    pressure "heirs: every page is right on it" --memory 105% --seed 8 --touches 0.2
    check "heirs: what is freed is flushed there" wait_for 30 eval '[ "$(stat_of freed_pages)" -gt 2000 ]'
    check_number "heirs: the sockets where observers are asked" "$(ls /run/tmem/*.freed-* | wc -l)" -eq 1
    kill -9 "$observer"
    check "heirs: nobody observes any more" wait_for 20 nobody_observes
    worker=$(pid_of tmem-worker)
    kill -9 "$worker"
    check "heirs: another goes on where nobody observes" wait_for 60 other_than tmem-worker "$worker"
    check "heirs: and says that freed swap is kept" wait_for 30 grep 'kept until it is written over' "$TMEM_LOG"
    pressure "heirs: every page is right without" --memory 60% --seed 7 --touches 0.2
    check_number "heirs: and nothing is flushed" "$(stat_of freed_pages)" -eq 0
    check "heirs: swapoff" swapoff "$DEVICE"
    check "heirs: blkdiscard" blkdiscard "$DEVICE"
    check_empty heirs
    stop_tmem
    check_number "heirs: the sockets that are left" "$(ls /run/tmem/*.freed-* 2>/dev/null | wc -l)" -eq 0
}

part_strangers() {
    local before
    start_tmem 320M 96M
    # Swap on the disk comes first, and then a file on the device, and its pages have the same numbers there.
    swap_on_silently $disk 200
    pressure "strangers: every page on the disk is right" --memory 110% --seed 6 --touches 0.2
    check_number "strangers: the disk was used" "$(awk '/^pswpout/ { print $2 }' /proc/vmstat)" -gt 5000
    check_number "strangers: what is freed there is not ours" "$(stat_of freed_pages)" -eq 0
    check "strangers: swapoff of the disk" swapoff $disk
    check "strangers: a file system on the device" mkfs.ext4 -q "$DEVICE"
    mkdir -p /tmp/there
    check "strangers: which is mounted" mount "$DEVICE" /tmp/there
    check "strangers: with a swap file" dd if=/dev/zero of=/tmp/there/swap bs=1M count=200 status=none
    chmod 600 /tmp/there/swap
    swap_on_silently /tmp/there/swap
    before=$(awk '/^pswpout/ { print $2 }' /proc/vmstat)
    in_cgroup 32M tmem-guest pressure --memory 64M --seed 8 >/tmp/in_file
    check "strangers: also of a program that must use it" grep '^pressure: .* errors=0 ' /tmp/in_file
    check_number "strangers: the file was used" "$(awk '/^pswpout/ { print $2 }' /proc/vmstat)" -gt $((before + 5000))
    check_number "strangers: what is freed there is not a page of the device" "$(stat_of freed_pages)" -eq 0
    check "strangers: swapoff of the file" swapoff /tmp/there/swap
    check "strangers: the file system ends" umount /tmp/there
    check "strangers: and is whole" e2fsck -fn "$DEVICE"
    stop_tmem
}

part_exported() {
    start_tmem 320M 96M --nbd unix:/tmp/tmem.nbd
    swap_on_silently "$DEVICE"
    # Little, for all of it is held that was ever swapped.
    in_cgroup 32M tmem-guest pressure --memory 64M --seed 9 >/tmp/exported
    check "exported: every page is right" grep '^pressure: .* errors=0 ' /tmp/exported
    check_number "exported: pages were swapped out" "$(stat_of succ_puts)" -gt 5000
    check_number "exported: nothing is flushed that others can reach" "$(stat_of freed_pages)" -eq 0
    check "exported: nobody observes" nobody_observes
    check "exported: swapoff" swapoff "$DEVICE"
    stop_tmem
}

[ $# -gt 0 ] || set -- places heirs strangers exported
run_parts "$@"
