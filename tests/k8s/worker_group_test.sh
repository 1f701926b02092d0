#!/usr/bin/env bash
# The supervisor of the two-gpu-pipeline overlay, over stand-ins for sluice-worker that note their variables: numbers and addresses,
# restart of the one that ended, giving up, SIGTERM. No test here measures time; a hang is ended by CTest.
set -euo pipefail
readonly GROUP=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/k8s/images/worker-group
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The stand-in writes a line, then waits for SIGTERM; worker 1 ends with code 3 as often as the file "deaths" has lines.
cat > "$work/sluice-worker" << 'STANDIN'
#!/usr/bin/env bash
trap 'echo "$SLUICE_WORKER_ID ended" >> "$WORK/log"; exit 0' TERM
echo "$SLUICE_WORKER_ID $SLUICE_LISTEN $SLUICE_DEVICE $SLUICE_DEVICE_INDEX ${SLUICE_UNIX_SOCKET:-none} ${SLUICE_METRICS_LISTEN:-none} $SLUICE_DIE_WITH_PARENT" >> "$WORK/log"
if [ "$SLUICE_WORKER_ID" = x-1 ]; then until grep -q "^x-0 " "$WORK/log"; do sleep 0.02; done; fi
if [ "$SLUICE_WORKER_ID" = x-1 ] && [ -s "$WORK/deaths" ]; then sed -i 1d "$WORK/deaths"; exit 3; fi
while true; do sleep 0.05; done
STANDIN
chmod +x "$work/sluice-worker"
export WORK=$work PATH=$work:$PATH WORKER_GROUP_SIZE=2 WORKER_GROUP_DEVICE=cuda WORKER_GROUP_PAUSE_S=0.05 \
  SLUICE_WORKER_ID=x SLUICE_LISTEN=0.0.0.0:7520

fail() { echo "FAILED: $*"; cat "$work/log" "$work/err"; exit 1; }
wait_for_lines() { until [ "$(wc -l < "$work/log")" -ge "$1" ]; do sleep 0.02; done; }
begin() { : > "$work/log"; printf 'x\n%.0s' $(seq "$1") | head -n "$1" > "$work/deaths"; }

# Two deaths of worker 1: it comes back, worker 0 was never started again; SIGTERM reaches both and the group ends with 0.
begin 2
WORKER_GROUP_SOCKETS=$work SLUICE_METRICS_LISTEN=0.0.0.0:9400 "$GROUP" 2> "$work/err" &
pid=$!
wait_for_lines 4
kill -TERM $pid
wait $pid || fail "code $? after SIGTERM"
[ "$(grep -cFx "x-0 0.0.0.0:7520 cuda:0 0 $work/worker-0.sock 0.0.0.0:9400 true" "$work/log")" = 1 ] || fail "worker 0"
[ "$(grep -cFx "x-1 0.0.0.0:7521 cuda:1 1 $work/worker-1.sock 0.0.0.0:9401 true" "$work/log")" = 3 ] || fail "worker 1"
grep -qFx "x-0 ended" "$work/log" && grep -qFx "x-1 ended" "$work/log" || fail "SIGTERM did not reach both"
[ "$(grep -c '"event":"worker_ended","worker":1,"code":3' "$work/err")" = 2 ] || fail "the deaths are not in the log"

# A worker that always dies: the group gives up, ends the other, code 1.
begin 100
code=0
WORKER_GROUP_DEVICE=cpu "$GROUP" 2> "$work/err" || code=$?
[ $code -eq 1 ] || fail "code $code, not 1"
grep -q '"event":"giving_up","worker":1' "$work/err" || fail "nothing about giving up"
[ "$(grep -cFx "x-1 0.0.0.0:7521 cpu 1 none none true" "$work/log")" = 6 ] || fail "not six attempts"
grep -qFx "x-0 ended" "$work/log" || fail "worker 0 was left"

# Without a size: refused.
if (unset WORKER_GROUP_SIZE; "$GROUP" 2> "$work/err"); then fail "no WORKER_GROUP_SIZE was accepted"; fi
echo "worker-group: all as it should be"
