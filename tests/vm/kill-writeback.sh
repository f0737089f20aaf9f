# kill-writeback.sh [KILLS [SEED]]: the process that serves is killed while it writes to a backing file and reads from it.
#
# What the dead process was writing may land after its death, and must not land in what the next one has written.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own processes"
kills=${1:-20}
seed=${2:-1}
pages=32768
device() { tmem-guest device --path "$DEVICE" --pages $pages --request 32 "$@"; }

start_tmem 512M 40M --backing /dev/vdb
check "there are two standbys" wait_for 60 are_standbys 2
check "more is written than memory may hold" device --write 1
check_number "some of it to the file" "$(stat_of bd_count)" -gt 1000
tmem-guest kill --name tmem-worker --while tmem-standby --count "$kills" --seed "$seed" >/tmp/kills &
killer=$!
version=1
while kill -0 $killer 2>/dev/null; do
    check "version $version is read" device --read $version
    version=$((version + 1))
    check "version $version is written" device --write $version
done
wait $killer
check_number "$kills workers were killed, and each was succeeded" $? -eq 0
cat /tmp/kills
check "version $version is read at last" device --read $version
check_number "no job failed" "$(stat_of log_failed_jobs)" -eq 0
check_number "the last one writes, too" "$(stat_of log_written_bytes)" -gt 0
check_frames "after $kills kills"
stop_tmem
finish
