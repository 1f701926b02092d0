# Sourced by run: what is done to the cluster, and what must come of it. The output is the transcript.

readonly N="-n sluice" IMAGE=sluice/controller:0.1.0
passed=0 failed=0 answers=0

title() { printf '\n== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }

# show COMMAND...: the command and all its output.
show() {
  local word line='$'
  for word in "$@"; do [[ $word != *[\ \{]* ]] || word="'$word'"; line+=" $word"; done
  printf '%s\n' "$line"
  "$@" 2>&1
}

# check CLAIM COMMAND...
check() {
  local claim=$1; shift
  if "$@" > /dev/null 2>&1; then printf ' ok   %s\n' "$claim"; passed=$((passed + 1))
  else printf ' FAIL %s\n' "$claim"; failed=$((failed + 1)); fi
}
within() { local seconds=$1; shift; until_true "$seconds" "$*" "$@"; }

# field KIND/NAME JSONPATH
field() { kubectl $N get "$1" -o jsonpath="{$2}"; }
is() { [ "$(field "$1" "$2")" = "$3" ]; }
contains() { grep -qF -- "$1" <<< "$2"; }
workers_ready() { is statefulset/sluice-worker .status.readyReplicas "$1"; }
# Addresses that a client of the Service can be sent to.
service_endpoints() {
  kubectl $N get endpointslice -l kubernetes.io/service-name=sluice -o jsonpath='{range .items[*].endpoints[?(@.conditions.ready==true)]}{.addresses[0]} {end}'
}
# How often the controller has begun to serve; served_again NUMBER: more often than that, and the Service knows it.
servings() { kubectl $N logs deployment/sluice-controller | grep -c '"event":"serving"'; }
more_servings() { [ "$(servings)" -gt "$1" ]; }
served_again() { within 90 more_servings "$1" && sleep 3 && within 60 served; }
no_endpoints() { [ -z "$(service_endpoints)" ]; }
served() { [ -n "$(service_endpoints)" ]; }

# Every change of the pods' states, with the second, from here to show_history.
watch_pods() {
  history_start=$SECONDS
  kubectl $N get pods --watch -o custom-columns='POD:.metadata.name,PHASE:.status.phase,STARTED:.status.containerStatuses[0].started,READY:.status.containerStatuses[0].ready,RESTARTS:.status.containerStatuses[0].restartCount,EXIT:.status.containerStatuses[0].state.terminated.exitCode,DELETED:.metadata.deletionTimestamp' \
    2> /dev/null | while read -r line; do printf '%4d s  %s\n' $((SECONDS - history_start)) "$line"; done > "$STATE/history" &
  watcher=$!
}
show_history() {
  kill $watcher 2> /dev/null || true
  note "how it went (second, pod, phase, startup probe passed, ready, restarts, exit code, being deleted):"
  sed 's/<none>/-/g; s/ *$//' "$STATE/history" | awk '{ state = $0; sub(/^ *[0-9]+ s /, "", state); if (seen[$3] != state) print; seen[$3] = state }'
}

# ask_in_background PROMPT TOKENS: a client's pod in another namespace, through the Service; its name is in $asker.
ask_in_background() {
  asker=client-$((++answers))
  show kubectl run $asker --image=$IMAGE --restart=Never --labels=sluice-client=true --command -- \
    sluice generate --address sluice.sluice:50051 --max-tokens "$2" "$1"
}
answered() {
  within 90 kubectl wait --for=jsonpath='{.status.phase}'=Succeeded --timeout=1s pod/$asker
}
ask() {
  ask_in_background "The capital of France is" 16
  answered || true
  show kubectl logs $asker
  check "answered through the Service" contains Paris "$(kubectl logs $asker)"
}

# The processes of a pod, found by its address.
processes_of() {
  local address namespace
  address=$(field "pod/$1" .status.podIP)
  for namespace in $(ip netns list | cut -d' ' -f1); do
    if ip -n "$namespace" -o address show dev eth0 | grep -q " $address/"; then ip netns pids "$namespace"; fi
  done
}

apply() {
  show kubectl apply -k "$1"
  within 120 workers_ready "$2" || true
  show kubectl $N rollout status statefulset/sluice-worker --timeout=5s
  within 60 served || true
  show kubectl $N get statefulset,deployment,pods -o wide
}

remove() {
  printf '$ kubectl delete -k %s\n' "$1"
  kubectl delete --wait -k "$1" > /dev/null
  kubectl delete pods --all > /dev/null
}

scene_nodes() {
  title "The cluster"
  show kubectl version
  show kubectl get nodes -o custom-columns='NODE:.metadata.name,READY:.status.conditions[?(@.type=="Ready")].status,CPU:.status.allocatable.cpu,MEMORY:.status.allocatable.memory,GPU:.status.allocatable.nvidia\.com/gpu,RUNTIME:.status.nodeInfo.containerRuntimeVersion'
}

# refused CLAIM SED: dev-cpu with one edit must be refused by the API server.
refused() {
  local message
  kubectl kustomize k8s/overlays/dev-cpu > "$STATE/right.yaml"
  sed -E "$2" "$STATE/right.yaml" > "$STATE/wrong.yaml"
  cmp -s "$STATE/right.yaml" "$STATE/wrong.yaml" && { check "$1: the edit changes nothing" false; return; }
  if message=$(kubectl apply --dry-run=server -f "$STATE/wrong.yaml" 2>&1 > /dev/null); then check "$1: refused" false
  else check "$1: refused" true; sed -E '/^Warning/d; s/error when creating "[^"]*": //; s/is invalid: $/is invalid:/' <<< "$message" | cut -c1-230 | uniq | head -2 | sed 's/^/        /'; fi
}

scene_dry_run() {
  local folder
  title "Every overlay before the API server's own checks, nothing kept"
  kubectl apply -f k8s/base/namespace.yaml > /dev/null
  for folder in k8s/overlays/* k8s/loadtest; do
    check "kubectl apply --dry-run=server -k $folder" kubectl apply --dry-run=server -k "$folder"
  done
  title "Bad values"
  refused "unknown field" 's/terminationGracePeriodSeconds/terminationGraceSeconds/'
  refused "negative replicas" 's/replicas: 2/replicas: -2/'
  refused "port above 65535" 's/containerPort: 7520/containerPort: 75200/'
  refused "probe without a port" 's/^( {8,})port: 50051$/\1port: 0/'
  refused "quantity that is none" 's/memory: 1536Mi/memory: 1536Megs/'
  refused "limit below request" 's/^( *)cpu: "1"$/\1cpu: 100m/'
  refused "selector that is not the template's" 's/^(      app.kubernetes.io.name:) sluice-worker$/\1 worker/'
  refused "budget with both bounds" 's/maxUnavailable: 0/maxUnavailable: 0\n  minAvailable: 1/'
  refused "range of ports upside down" 's/endPort: 7527/endPort: 7510/'
  refused "environment variable with = in its name" 's/name: SLUICE_DEVICE_INDEX/name: "SLUICE=DEVICE"/'
  check "a pod without the restricted security context: refused in this namespace" \
    contains 'violates PodSecurity "restricted' "$(kubectl $N run bare --image=$IMAGE --dry-run=server 2>&1)"
}

scene_dev_cpu() {
  title "dev-cpu: two workers on CPUs"
  watch_pods
  show kubectl apply -k k8s/overlays/dev-cpu
  title "Before the model is there: no loader yet"
  show kubectl $N scale deployment/sluice-loader --replicas=0
  within 60 is pod/sluice-worker-0 '.status.containerStatuses[0].started' true || true
  within 60 is pod/sluice-worker-1 '.status.containerStatuses[0].started' true || true
  sleep 6
  show kubectl $N get pods
  check "workers: started and live, not ready" is pod/sluice-worker-1 '.status.containerStatuses[0].ready' false
  check "the Service has no endpoint" no_endpoints
  show kubectl $N get events --field-selector reason=Unhealthy -o custom-columns='POD:.involvedObject.name,MESSAGE:.message'
  check "the kubelet's own word: readiness probe, NOT_SERVING" contains NOT_SERVING "$(kubectl $N get events --field-selector reason=Unhealthy)"
  title "The loader comes"
  show kubectl $N scale deployment/sluice-loader --replicas=1
  within 120 workers_ready 2 || true
  within 60 served || true
  show kubectl $N rollout status statefulset/sluice-worker --timeout=5s
  show kubectl $N get statefulset,deployment,pods -o wide
  show_history
  check "2/2 workers ready" workers_ready 2
  check "the Service has an endpoint" served
  ask
  show kubectl $N exec deployment/sluice-controller -- sluice map --admin 127.0.0.1:7502
  printf '$ kubectl -n sluice port-forward service/sluice 50051 &\n'
  kubectl $N port-forward service/sluice 50051 > /dev/null 2>&1 &
  forwarder=$!
  until_true 20 "port-forward" bash -c '< /dev/tcp/127.0.0.1/50051'
  check "answered through kubectl port-forward" contains Paris \
    "$("$BUILD/bin/sluice" generate --address 127.0.0.1:50051 --max-tokens 8 "The capital of France is" 2>&1)"
  kill $forwarder
}

scene_worker_down() {
  local before
  title "A worker's process is killed (kill -9)"
  watch_pods
  note "kill -9 of the processes of sluice-worker-1"
  before=$(servings)
  kill -9 $(processes_of sluice-worker-1)
  check "the kubelet starts it again" within 60 is pod/sluice-worker-1 '.status.containerStatuses[0].restartCount' 1
  check "2/2 workers ready again" within 90 workers_ready 2
  check "the Service has an endpoint again" served_again $before
  check "the other worker was not restarted" is pod/sluice-worker-0 '.status.containerStatuses[0].restartCount' 0
  check "nor the controller" is "pod/$(kubectl $N get pods -l app.kubernetes.io/name=sluice-controller -o jsonpath='{.items[0].metadata.name}')" '.status.containerStatuses[0].restartCount' 0
  show_history
  ask
}

# Its liveness probe is the only thing that can help.
scene_worker_frozen() {
  local processes before
  title "A worker hangs (kill -STOP)"
  watch_pods
  processes=$(processes_of sluice-worker-0)
  before=$(servings)
  note "kill -STOP of the processes of sluice-worker-0"
  kill -STOP $processes
  check "the worker is not ready" within 20 is pod/sluice-worker-0 '.status.containerStatuses[0].ready' false
  check "the controller is not ready: no endpoint" within 20 no_endpoints
  show kubectl $N get pods
  check "the kubelet ends it and starts it again" within 150 is pod/sluice-worker-0 '.status.containerStatuses[0].restartCount' 1
  check "the Service has an endpoint again" served_again $before
  check "2/2 workers ready again" within 60 workers_ready 2
  show kubectl $N get events --field-selector involvedObject.name=sluice-worker-0,reason!=Scheduled -o custom-columns='REASON:.reason,COUNT:.count,MESSAGE:.message'
  show_history
  ask
}

scene_rolling_restart() {
  title "Rolling restart of the workers"
  watch_pods
  show kubectl $N rollout restart statefulset/sluice-worker
  check "it ends by itself" kubectl $N rollout status statefulset/sluice-worker --timeout=180s
  check "2/2 workers ready" within 60 workers_ready 2
  check "the Service has an endpoint" within 60 served
  show kubectl $N get pods
  show_history
  ask
}

scene_drain() {
  local node controller
  title "Drain: the budget protects the workers"
  node=$(field pod/sluice-worker-0 .spec.nodeName)
  show kubectl drain "$node" --pod-selector=app.kubernetes.io/name=sluice-worker --timeout=8s || true
  check "no worker was evicted" workers_ready 2
  show kubectl uncordon "$node"

  title "Drain: the controller finishes what it has begun"
  controller=$(kubectl $N get pods -l app.kubernetes.io/name=sluice-controller -o jsonpath='{.items[0].metadata.name}')
  node=$(field "pod/$controller" .spec.nodeName)
  kubectl $N logs --follow "$controller" > "$STATE/controller.log" 2>&1 &
  ask_in_background "1, 2, 3, 4, 5, 6, 7," 768
  within 30 kubectl wait --for=condition=Ready --timeout=1s pod/$asker || true
  sleep 2
  watch_pods
  show kubectl drain "$node" --pod-selector=app.kubernetes.io/name=sluice-controller --timeout=60s
  check "the request under way ended well" answered
  note "its answer ends with: ...$(kubectl logs $asker | tail -c 60 | tr '\n' ' ')"
  note "the old controller's last words:"
  tail -5 "$STATE/controller.log"
  check "SIGTERM came amid the request" grep -q '"event":"draining","live_requests":1' "$STATE/controller.log"
  check "a controller on another node: endpoint" within 60 served
  check "2/2 workers ready" within 60 workers_ready 2
  show kubectl $N get pods -o wide
  show_history
  check "the old controller exited with 0, within its grace" grep -Eq "$controller +(Running|Succeeded) +false +false +0 +0 " "$STATE/history"
  ask
  show kubectl uncordon "$node"
}

# As k8s/README.md says.
scene_empty_node() {
  local node
  title "A node is emptied"
  node=$(field pod/sluice-worker-0 .spec.nodeName)
  kubectl delete pods --all > /dev/null
  watch_pods
  show kubectl cordon "$node"
  for pod in $(kubectl $N get pods -l app.kubernetes.io/name=sluice-worker -o jsonpath="{.items[?(@.spec.nodeName=='$node')].metadata.name}"); do
    show kubectl $N delete pod "$pod"
  done
  show kubectl drain "$node" --delete-emptydir-data --timeout=60s
  check "2/2 workers ready" within 60 workers_ready 2
  check "the Service has an endpoint" within 60 served
  check "nothing of ours is left on the node" test -z "$(kubectl $N get pods -o jsonpath="{.items[?(@.spec.nodeName=='$node')].metadata.name}")"
  show_history
  ask
  show kubectl uncordon "$node"
}

last_words() { field "pod/$1" '.status.containerStatuses[0].lastState.terminated.message'; }
spoke() { [ -n "$(last_words "$1")" ]; }

# The node's answer to a program that ends itself: its last words are in the pod's status (terminationMessagePolicy).
scene_bad_setting() {
  title "A setting that the program refuses"
  show kubectl $N set env statefulset/sluice-worker SLUICE_MEMORY=plenty
  within 60 spoke sluice-worker-1 || true
  show kubectl $N get pods
  note "last words of sluice-worker-1: $(last_words sluice-worker-1)"
  check "they name the setting" contains --memory "$(last_words sluice-worker-1)"
  check "the other worker was left as it was" is pod/sluice-worker-0 '.status.containerStatuses[0].restartCount' 0
  show kubectl $N rollout undo statefulset/sluice-worker
  # Kubernetes does not replace a pod that never became ready by itself: a known limit of StatefulSets.
  show kubectl $N delete pod sluice-worker-1
  check "2/2 workers ready again" within 90 workers_ready 2
  check "the Service has an endpoint again" within 60 served
}

load_ended() { [ -n "$(field job/sluice-load .status.succeeded)$(field job/sluice-load .status.failed)" ]; }

scene_load() {
  title "A load test inside the cluster"
  show kubectl apply -k k8s/loadtest
  within 240 load_ended || true
  check "the Job ended well" is job/sluice-load .status.succeeded 1
  show kubectl $N logs job/sluice-load
  show kubectl $N get pods
  kubectl delete -k k8s/loadtest > /dev/null
}

volume() {
  kubectl apply -f - > /dev/null << VOLUME
{apiVersion: v1, kind: PersistentVolume, metadata: {name: sluice-models}, spec: {capacity: {storage: 100Mi}, accessModes: [ReadOnlyMany],
 hostPath: {path: $STATE/models}, claimRef: {namespace: sluice, name: sluice-models}, persistentVolumeReclaimPolicy: Retain}}
VOLUME
}

# There is no CUDA worker here: what a user sees who takes the CPU's image for it.
scene_two_pods_as_it_is() {
  title "two-pods as it is, with the CPU's worker: refused in words"
  printf '$ kubectl apply -k k8s/overlays/two-pods\n'
  kubectl apply -k k8s/overlays/two-pods > /dev/null
  within 60 spoke sluice-worker-0 || true
  show kubectl $N get pods -o wide
  note "last words of sluice-worker-0: $(last_words sluice-worker-0)"
  check "they name the way out" contains "device cpu" "$(last_words sluice-worker-0)"
  check "the loader waits for the claim that its user provides" contains 'persistentvolumeclaim "sluice-models" not found' \
    "$(kubectl $N get events --field-selector reason=FailedScheduling)"
  remove k8s/overlays/two-pods
}

scene_two_pods() {
  title "two-pods: a GPU a pod for the scheduler, CPU workers for us"
  volume
  apply tests/k8s/cluster/on-cpu/two-pods 2
  check "2/2 workers ready" workers_ready 2
  check "each on a node with GPUs" test "$(kubectl $N get pods -l app.kubernetes.io/name=sluice-worker -o jsonpath='{.items[*].spec.nodeName}' | grep -o gpu- | wc -l)" = 2
  ask
  show kubectl $N exec deployment/sluice-controller -- sluice map --admin 127.0.0.1:7502
  remove tests/k8s/cluster/on-cpu/two-pods
  kubectl delete pv sluice-models > /dev/null
}

scene_two_gpu_pipeline() {
  title "two-gpu-pipeline: two GPUs and two workers in one pod, CPU workers for us"
  volume
  apply tests/k8s/cluster/on-cpu/two-gpu-pipeline 1
  check "1/1 pods ready" workers_ready 1
  check "on the node with two GPUs" is pod/sluice-worker-0 .spec.nodeName gpu-a
  show kubectl $N exec sluice-worker-0 -- ps -o pid,args
  show kubectl $N exec sluice-worker-0 -- ls -l /run/sluice
  check "a Unix socket links them" contains '"transport":"unix"' "$(kubectl $N logs sluice-worker-0)"
  ask
  title "One of the two is killed (kill -9)"
  kill -9 "$(processes_of sluice-worker-0 | xargs ps -o pid=,args= -p | awk '$2 == "sluice-worker" { print $1 }' | sort -n | head -1)"
  check "served again" served_again 1
  kubectl $N logs deployment/sluice-controller | grep -E '"(pipeline_lost|worker_attached|worker_ready|serving)"' | tail -5
  check "the supervisor started it again" contains '"event":"worker_ended"' "$(kubectl $N logs sluice-worker-0)"
  check "the pod was not restarted" is pod/sluice-worker-0 '.status.containerStatuses[0].restartCount' 0
  ask
  show kubectl $N exec deployment/sluice-controller -- sluice map --admin 127.0.0.1:7502
  remove tests/k8s/cluster/on-cpu/two-gpu-pipeline
  kubectl delete pv sluice-models > /dev/null
}

scene_end() { remove k8s/overlays/dev-cpu; }

# play [SCENE...]: all scenes, or those named.
play() {
  local scene scenes=("$@")
  [ $# -gt 0 ] || scenes=(nodes dry_run dev_cpu worker_down worker_frozen rolling_restart drain empty_node bad_setting load end two_pods_as_it_is two_pods two_gpu_pipeline)
  cd "$HERE/../../.."
  {
    for scene in "${scenes[@]}"; do
      "scene_$scene" || check "scene $scene ran to its end" false
    done
    printf '\nTests: %d passed, %d failed\n' $passed $failed
    [ $failed -eq 0 ]
  } | sed -u -e "s|$STATE|STATE|g" -e "s|$PWD/||g"
}
