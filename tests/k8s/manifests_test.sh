#!/usr/bin/env bash
# Every flag, port, probe, selector, image and file that the manifests in k8s/ name exists in the programs; grace periods fit the drain.
# Needs bash, grep and awk, no cluster. tests/k8s/validate.sh checks the manifests' own form.
# usage: manifests_test.sh BIN_FOLDER [ROOT]       BIN_FOLDER: the built programs; ROOT: the tree (default: this one)
#        manifests_test.sh --self-test BIN_FOLDER  proves that each rule can fail, on copies with a mistake planted
set -euo pipefail
readonly HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly PROGRAMS=(sluice-controller sluice-loader sluice-worker)

# facts BIN ROOT: what the programs and the tree are, for check.awk.
facts() {
  local program help folder
  declare -A main_of=([sluice-controller]=services/controller [sluice-loader]=services/loader [sluice-worker]=worker)
  for program in "${PROGRAMS[@]}"; do
    help=$("$1/$program" --help) || { echo "$1/$program does not run: build it first" >&2; return 2; }
    sed -n "s/^  --[a-z-]* .*REQUIRED.*(Env:\(SLUICE_[A-Z_]*\)).*/fact|flag|$program|\1|required/p; t
      s/^  --[a-z-]* .*(Env:\(SLUICE_[A-Z_]*\)).*/fact|flag|$program|\1|optional/p" <<< "$help"
    folder=$2/${main_of[$program]}
    sed -n "s/.*kLastResortSeconds = \([0-9]*\);.*/fact|last_resort|$program|\1/p" "$folder/main.cc"
  done
  # Names in server_runner.cc, and the public services' own.
  sed -n 's/.*SetServingStatus("\([a-z]*\)".*/fact|health|\1/p; s/.*ready_names_[.]insert.*{"", "\([a-z]*\)"}.*/fact|health|\1/p' \
    "$2/services/rpc/server_runner.cc"
  sed -n 's/^service \([A-Za-z]*\) .*/fact|health|sluice.v1.\1/p' "$2"/proto/sluice/v1/*.proto
  sed -n 's/^project(sluice VERSION \([0-9.]*\).*/fact|version|\1/p' "$2/CMakeLists.txt"
  sed -n 's/^FROM .* AS \([a-z-]*\)$/fact|target|\1/p' "$2/Dockerfile"
  (cd "$2/tests/load" && printf '%s\n' *.json | sed 's/\(.*\)[.]json/fact|recipe|\1/')
  (cd "$2/k8s" && find . -mindepth 1 | sed 's|^\./|fact\|file\||')
}

# check BIN ROOT
check() {
  local work status=0
  work=$(mktemp -d)
  facts "$1" "$2" > "$work/facts" && grep -q '^fact|health|ready$' "$work/facts" && grep -q '^fact|last_resort|sluice-worker|' "$work/facts" ||
    { echo "the programs' facts could not be read (flags, health names, kLastResortSeconds)"; rm -rf "$work"; return 2; }
  (cd "$2/k8s" && find . -name '*.yaml' | sed 's|^\./||' | sort | xargs awk -f "$HERE/flatten.awk") > "$work/values" || status=2
  [ $status -ne 0 ] || awk -f "$HERE/check.awk" "$work/facts" "$work/values" || status=$?
  rm -rf "$work"
  return $status
}

# must_fail FILE SED WORDS: a copy with FILE edited so is refused with WORDS in the message.
must_fail() {
  local root report
  root=$(mktemp -d)
  copy_tree "$root"
  sed -i "$2" "$root/$1"
  if cmp -s "$root/$1" "$HERE/../../$1"; then echo "the mistake was not planted: $2 in $1"; failures=$((failures + 1))
  elif report=$(check "$BIN" "$root" 2>&1); then echo "NOT refused: $2 in $1"; failures=$((failures + 1))
  elif [[ $report != *"$3"* ]]; then echo "refused for another reason: $2 in $1: $report"; failures=$((failures + 1))
  else echo "refused, as it must be: $2 in $1"
  fi
  rm -rf "$root"
}
copy_tree() { (cd "$HERE/../.." && cp -r --parents k8s tests/load Dockerfile CMakeLists.txt proto/sluice services/*/main.cc services/rpc/server_runner.cc worker/main.cc "$1"); }

self_test() {
  failures=0
  local base=k8s/base overlays=k8s/overlays
  must_fail $base/kustomization.yaml 's/SLUICE_DRAIN_MS/SLUICE_DRAIN_SECONDS/' 'SLUICE_DRAIN_SECONDS (ConfigMap) is no flag of sluice-controller'
  must_fail $base/worker.yaml 's/SLUICE_DEVICE_INDEX/SLUICE_ORDINAL/' 'SLUICE_ORDINAL (env) is no flag of sluice-worker'
  must_fail $base/controller.yaml 's/^        envFrom:/        args:\n        - --drain-seconds=3\n&/' 'is no flag of sluice-controller'
  must_fail $base/kustomization.yaml '/SLUICE_CONTROLLER=/d' 'not given SLUICE_CONTROLLER'
  must_fail $overlays/dev-cpu/kustomization.yaml 's/SLUICE_MODEL=/SLUICE_MODELS=/' 'is no flag of sluice-loader'
  must_fail $base/worker.yaml '0,/port: 7520/s//port: 7521/' 'probe port 7521'
  must_fail $base/controller.yaml 's/containerPort: 7501/containerPort: 7502/' 'does not listen on containerPort 7502'
  must_fail $base/services.yaml 's/port: 7510/port: 7511/' 'port 7511 is not the port'
  must_fail $base/services.yaml 's/targetPort: stage/targetPort: stages/' 'is not the port of sluice-worker called stages'
  must_fail $base/network.yaml 's/port: 7510/port: 7610/' 'does not listen on 7610'
  must_fail $base/loader.yaml 's/containerPort: 9400/containerPort: 9401/' 'does not listen on containerPort 9401'
  must_fail $base/kustomization.yaml '0,/SLUICE_METRICS_LISTEN/{/SLUICE_METRICS_LISTEN/d}' 'sluice-controller: no container port called metrics'
  must_fail $base/kustomization.yaml 's/SLUICE_METRICS_LISTEN=0.0.0.0/SLUICE_METRICS_LISTEN=127.0.0.1/' 'does not listen on containerPort 9400'
  must_fail $base/worker.yaml 's/prometheus.io.port: "9400"/prometheus.io\/port: "9401"/' 'annotations prometheus.io/scrape and port'
  must_fail $base/network.yaml 's/port: 9400/port: 9410/' 'does not listen on 9410'
  must_fail $base/network.yaml 's|/part-of: sluice|/part-of: sluices|' 'no pod has the label'
  must_fail $base/network.yaml '/name: sluice-metrics/,/ports:/{/part-of/d}' 'no NetworkPolicy lets Prometheus reach port 9400'
  must_fail k8s/components/pod-monitor/pod-monitor.yaml 's/port: metrics$/port: prometheus/' 'no container has a port called prometheus'
  must_fail $base/kustomization.yaml 's/SLUICE_CONTROLLER=sluice-controller:7501/SLUICE_CONTROLLER=sluice:50051/' 'is not the port of SLUICE_INTERNAL_LISTEN'
  must_fail $base/kustomization.yaml 's/SLUICE_LOADER=sluice-loader/SLUICE_LOADER=loader/' 'is no Service of sluice-loader'
  must_fail $base/kustomization.yaml 's/SLUICE_LISTEN=0.0.0.0:7520/SLUICE_LISTEN=127.0.0.1:7520/' 'listens on loopback'
  must_fail $base/controller.yaml 's/service: ready/service: readiness/' 'health service "readiness"'
  must_fail $base/worker.yaml 's/service: live/service: ready/' 'a liveness probe of the service live'
  must_fail $base/services.yaml 's|app.kubernetes.io/name: sluice-loader|&s|' 'no pod has the label'
  must_fail $base/disruption.yaml 's|/name: sluice-worker|&s|' 'no pod has the label'
  must_fail $base/worker.yaml 's/serviceName: .*/serviceName: sluice-loader/' 'is no headless Service'
  must_fail $base/controller.yaml 's/terminationGracePeriodSeconds: 50/terminationGracePeriodSeconds: 40/' 'terminationGracePeriodSeconds 40'
  must_fail $base/kustomization.yaml 's/SLUICE_DRAIN_MS=30000/SLUICE_DRAIN_MS=60000/' 'drain 60'
  must_fail $base/loader.yaml 's/enableServiceLinks: false/enableServiceLinks: true/' 'enableServiceLinks'
  must_fail $base/loader.yaml 's/runAsNonRoot: true/runAsNonRoot: false/' 'not restricted'
  must_fail $base/worker.yaml 's/name: sluice-worker$/name: sluice-workers/' 'envFrom must be'
  must_fail $base/worker.yaml 's|sluice/worker-cpu:|sluice/worker:|' 'no target worker'
  must_fail $base/worker.yaml 's|:0.1.0|:latest|' 'not pinned'
  must_fail k8s/components/gpu/kustomization.yaml 's|worker-cuda|worker-rocm|' 'no target worker-rocm'
  must_fail $base/kustomization.yaml 's/network.yaml/networks.yaml/' 'networks.yaml is not there'
  must_fail $overlays/two-pods/kustomization.yaml 's|components/gpu|components/gpus|' 'is not there'
  must_fail $overlays/two-gpu-pipeline/kustomization.yaml 's/SLUICE_WORKERS=2/SLUICE_WORKERS=3/' 'SLUICE_WORKERS=3, but there are 1 pods of 2'
  must_fail $overlays/dev-cpu/kustomization.yaml 's/SLUICE_MEMORY=1GiB/SLUICE_MEMORY=1.4GiB/' 'leaves less than a fifth'
  must_fail $base/worker.yaml 's/^spec:/spec: {*anchor}\n&\nplain text/' 'not in the plain form'
  must_fail k8s/loadtest/kustomization.yaml 's/RECIPE=unary/RECIPE=unaries/' 'no recipe unaries'
  must_fail k8s/loadtest/kustomization.yaml 's/ADDRESS=sluice:50051/ADDRESS=sluice-controller:7501/' 'is not the port of SLUICE_LISTEN'
  must_fail services/rpc/server_runner.cc 's/"live"/"alive"/' 'health service "live"'
  [ $failures -eq 0 ] || { echo "$failures rules cannot fail"; exit 1; }
  echo "every rule can fail"
}

if [ "${1:-}" = --self-test ]; then
  BIN=${2:?folder of the built programs}
  check "$BIN" "$HERE/../.." || { echo "the tree itself is refused"; exit 1; }
  self_test
else
  check "${1:?folder of the built programs, e.g. build/bin}" "${2:-$HERE/../..}"
fi
