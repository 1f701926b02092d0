# Sourced by run. Starts etcd, Kubernetes' programs and four nodes, all on addresses for documentation (RFC 5737) that exist in this
# network namespace only. Certificate and tokens are made anew each time. All state is in a tmpfs on $STATE.

readonly MASTER=203.0.113.1 SERVICES=198.51.100.0/24 LOGS=$STATE/logs
readonly KUBE=$TOOLS/bin/kube
#                   name   address     first pod    cores GiB GPUs
readonly NODES=("cpu-a 203.0.113.11 192.0.2.1   4 16 0"
                "cpu-b 203.0.113.12 192.0.2.65  4 16 0"
                "gpu-a 203.0.113.13 192.0.2.129 8 32 2"
                "gpu-b 203.0.113.14 192.0.2.193 8 32 1")

# background NAME COMMAND...
background() { local name=$1; shift; "$@" > "$LOGS/$name.log" 2>&1 < /dev/null & }

# until_true SECONDS WHAT COMMAND...
until_true() {
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { say "not within its time: $what"; return 1; }
    sleep 0.3
  done
}

# identity USER GROUP: a token in the API server's list, and $STATE/USER.kubeconfig with it.
identity() {
  local token file=$STATE/${1##*:}.kubeconfig
  token=$(openssl rand -hex 16)
  echo "$token,$1,$1,\"$2\"" >> "$STATE/tokens"
  cat > "$file" << KUBECONFIG
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$MASTER:6443", certificate-authority: $STATE/tls.crt}}]
users: [{name: me, user: {token: $token}}]
contexts: [{name: test, context: {cluster: test, user: me}}]
current-context: test
KUBECONFIG
}

prepare_state() {
  local node name address
  mount --make-rprivate /
  mount -t tmpfs -o mode=755 tmpfs "$STATE"
  mkdir -p "$LOGS" "$STATE/models" /run/netns
  mount -t tmpfs tmpfs /run/netns
  mount -t tmpfs tmpfs /var/log  # A kubelet writes there
  ip link set lo up
  ip address add $MASTER/32 dev lo
  for node in "${NODES[@]}"; do
    read -r name address _ <<< "$node"
    ip address add "$address/32" dev lo
  done
  echo 1 > /proc/sys/net/ipv4/ip_forward
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test -keyout "$STATE/tls.key" \
    -out "$STATE/tls.crt" -addext "subjectAltName=IP:$MASTER,IP:198.51.100.1" 2> /dev/null
  openssl ecparam -genkey -name prime256v1 -noout -out "$STATE/accounts.key"
  openssl ec -in "$STATE/accounts.key" -pubout -out "$STATE/accounts.pub" 2> /dev/null
  identity admin system:masters
  identity system:kube-scheduler ''
  identity system:kube-controller-manager ''
  identity system:kube-proxy ''
  for node in "${NODES[@]}"; do
    identity "system:node:${node%% *}" system:nodes
  done
  cp "$MODEL" "$STATE/models/"
  "$HERE/make-images" "$BUILD" "$(dirname "$MODEL")" "$TOOLS/bin" "$STATE/images"
}

start_control_plane() {
  background etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level error
  background apiserver "$KUBE" apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address $MASTER \
    --service-cluster-ip-range $SERVICES --authorization-mode Node,RBAC --token-auth-file "$STATE/tokens" \
    --tls-cert-file "$STATE/tls.crt" --tls-private-key-file "$STATE/tls.key" --allow-privileged \
    --service-account-issuer https://test --service-account-key-file "$STATE/accounts.pub" \
    --service-account-signing-key-file "$STATE/accounts.key" --kubelet-preferred-address-types InternalIP
  until_true 120 "API server" kubectl get --raw /readyz
  background scheduler "$KUBE" scheduler --kubeconfig "$STATE/kube-scheduler.kubeconfig" --leader-elect=false
  background controller-manager "$KUBE" controller-manager --kubeconfig "$STATE/kube-controller-manager.kubeconfig" \
    --leader-elect=false --use-service-account-credentials --service-account-private-key-file "$STATE/accounts.key" \
    --root-ca-file "$STATE/tls.crt" --flex-volume-plugin-dir "$STATE/plugins"
  background proxy "$KUBE" proxy --kubeconfig "$STATE/kube-proxy.kubeconfig" --proxy-mode nftables --hostname-override cpu-a \
    --conntrack-max-per-core 0
  background dns "$TOOLS/bin/dns" --kubeconfig "$STATE/admin.kubeconfig" --listen $MASTER:53
}

# start_node NAME ADDRESS FIRST_POD CORES GIB GPUS
start_node() {
  background "$1-runtime" "$TOOLS/bin/runtime" --socket "$STATE/$1.sock" --images "$STATE/images" --folder "$STATE/$1" --node "$2" \
    --first-pod "$3"
  background "$1" "$KUBE" node --name "$1" --address "$2" --dns $MASTER --kubeconfig "$STATE/$1.kubeconfig" \
    --runtime "unix://$STATE/$1.sock" --folder "$STATE/$1-kubelet" --cores "$4" --memory-gib "$5" --gpus "$6"
}

start_cluster() {
  local node
  prepare_state
  export KUBECONFIG=$STATE/admin.kubeconfig PATH=$TOOLS/python/bin:$PATH
  start_control_plane
  for node in "${NODES[@]}"; do
    start_node $node
  done
  until_true 60 "nodes" kubectl wait --for condition=Ready --timeout 1s node "${NODES[@]%% *}"
}
