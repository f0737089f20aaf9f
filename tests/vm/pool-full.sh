# pool-full.sh: a pool that cannot take more. Needs a disk for swap: scripts/vm --disk 512M.
#
# A write that finds no room fails with an error; what it replaced is gone rather than stale, and all
# else is untouched. Room that is made is used again. Swap on such a device loses no page.

. "$(dirname "$0")/lib.sh"
cd /tmp
disk=/dev/vdb
[ -b $disk ] || give_up "needs a second disk: scripts/vm --disk 512M"

pages=16384
limit=16M

# page_of N: what the test writes to page N: it does not compress, and no two are alike.
page_of() { dd if=source bs=4k skip=$(($1 % 2048)) count=1 status=none; }
read_page() { dd if="$DEVICE" iflag=direct bs=4k skip="$1" count=1 status=none; }
write_page() { dd of="$DEVICE" oflag=direct conv=notrunc bs=4k seek="$1" count=1 status=none; }

dd if=/dev/urandom of=source bs=1M count=8 status=none
start_tmem "$((pages * 4))K" $limit

# Copies of the source until the device refuses.
stored=0
for copy in 0 1 2 3 4 5 6 7; do
    dd if=source of="$DEVICE" oflag=direct conv=notrunc bs=4k seek=$((copy * 2048)) 2>error && continue
    stored=$((copy * 2048 + $(sed -n 's/^\([0-9]*\)+0 records out/\1/p' error)))
    break
done
show_stats
check_number "the pool fills up" "$stored" -gt 2048
check_number "and refuses only near its limit" $((stored * 4096)) -gt $(($(bytes $limit) * 3 / 4))
check_number "memory stays within the limit" "$(stat_of mem_used_total)" -le "$(bytes $limit)"
check_frames "full"
if only_tmem "the error is ENOSPC"; then
    check "the error is ENOSPC" grep 'No space left on device' error
    check_number "refusals are counted" "$(stat_of failed_puts)" -gt 0
fi

wrong=0
for page in $(seq 0 97 $((stored - 1))) $((stored - 1)); do
    page_of "$page" >expected
    read_page "$page" | cmp -s - expected || wrong=$((wrong + 1))
done
check_number "what was stored before is right" $wrong -eq 0

if only_tmem "a refused page is an error to read, never its old data"; then
    check_fails "the refused page cannot be read" read_page "$stored"
    page_of 7 >expected
    if page_of 1000 | write_page 7 2>/dev/null; then
        page_of 1000 >expected
        check "a page rewritten while full is the new one" eval 'read_page 7 | cmp - expected'
    else
        check_fails "a page whose rewrite was refused cannot be read" read_page 7
    fi
fi

check "a page that compresses still reads back" eval 'read_page 1 | cmp - <(page_of 1)'
check "discard of half" blkdiscard -o 0 -l $((stored / 2 / 512 * 512 * 4096)) "$DEVICE"
check "writing works again" dd if=source of="$DEVICE" oflag=direct conv=notrunc bs=4k count=1024 status=none
check "and reads back" eval \
    'dd if="$DEVICE" iflag=direct bs=4k count=1024 status=none | cmp -n $((1024 * 4096)) - source'
check "discard of everything" blkdiscard "$DEVICE"
check_empty "after the pool was full"
check "a refused page is zeros after a discard" eval 'read_page "$stored" | cmp -n 4096 - /dev/zero'
rm -f source
stop_tmem

# Swap: data that does not compress, more than the pool takes. What the device refuses stays in
# memory, where the kernel tries it again and again, and the rest goes to the disk.
start_tmem 32M 16M
mkswap $disk >/dev/null && swapon --priority 10 $disk || give_up "no swap on $disk"
swap_on "$DEVICE" 100
pressure "no page is lost when the pool is full" \
    --memory "${SHARE:-110}%" --fill random=100 --seed 5 --passes 1
show_stats
check_number "the pool was full" "$(dmesg | grep -c 'Write-error on swap-device')" -gt 0
check_frames "after swap on a full pool"
check "swapoff of the device" swapoff "$DEVICE"
check "swapoff of the disk" swapoff $disk
# Forced: without that it looks for a file system first, and may hit a page that was refused.
check "blkdiscard" blkdiscard --force "$DEVICE"
check_empty "after swap on a full pool"
stop_tmem
finish
