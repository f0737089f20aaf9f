# takeover.sh: how long a device stands still when the process that serves it is replaced, by an upgrade or by its death.
#
# Reads of single pages, one after the other, go on all the time; what counts is the longest of them. The pool holds SIZE of
# pages (2G), which the next process has to take over.
#
#   SIZE, ROUNDS (20)

. "$(dirname "$0")/lib.sh"
rounds=${ROUNDS:-20}

start_tmem "${SIZE:-2G}" "${SIZE:-2G}"
pages=$(($(blockdev_bytes "$DEVICE") / 4096))
tmem-guest device --path "$DEVICE" --pages "$pages" --request 32 --write 1 >/tmp/device || give_up "cannot write to $DEVICE"
say "$(stat_of obj_count) objects, $(stat_of frames_allocated) frames, $(stat_of mem_used_total) bytes of memory"
printf '#!/bin/bash\n. %q\n' "$TESTS/lib.sh" >/tmp/common
upgrade() {
    { cat /tmp/common; echo 'wait_for 60 are_standbys 2 && tmem upgrade'; } >/tmp/upgrade
    tmem-guest pause --path "$DEVICE" --pages "$pages" --count "$rounds" --run 'bash /tmp/upgrade' >/tmp/pause
}
death() {
    {
        cat /tmp/common
        echo 'wait_for 60 are_standbys 2; worker=$(pid_of tmem-worker); kill -9 $worker; wait_for 60 other_than tmem-worker $worker'
    } >/tmp/death
    tmem-guest pause --path "$DEVICE" --pages "$pages" --count "$rounds" --run 'bash /tmp/death' >/tmp/pause
}
for way in upgrade death; do
    check "$way: $rounds times" $way
    sed "s/^pause:/$way:/" /tmp/pause
    say "$way: the last take-over itself took $(stat_of takeover_ns_last) ns"
done
check "every page is right" tmem-guest device --path "$DEVICE" --pages "$pages" --request 32 --read 1
stop_tmem
finish
