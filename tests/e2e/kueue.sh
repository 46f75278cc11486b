#!/usr/bin/env bash
# Kueue on a cluster of ../shared/cluster, which has no registry: built from its Go module, with its own manifests.
#   tests/e2e/kueue.sh build    the program and the manifests, into CLUSTER_CACHE/kueue-VERSION (once, about 5 minutes)
#   tests/e2e/kueue.sh          the same, and then Kueue as a pod of the first node, until its webhooks answer
# Needs what tests/e2e/run sets: E2E_CLUSTER_TOOLS, CLUSTER_CACHE, CLUSTER_STATE and, to install, KUBECONFIG.
set -euo pipefail
version=0.17.0
module=sigs.k8s.io/kueue
cache=$CLUSTER_CACHE/kueue-$version
image=localhost/kueue:$version

build() {
    local new=$cache.new
    [ ! -d "$cache" ] || return 0
    rm -rf "$new"
    mkdir -p "$new/rootfs"
    # At a version `go install` takes the module's own go.mod and go.sum: all that is built is what the project pins.
    (cd / && CGO_ENABLED=0 GOBIN=$new/rootfs go install -ldflags "-s -w -X $module/pkg/version.GitVersion=v$version" \
        "$module/cmd/kueue@v$version")
    mv "$new/rootfs/kueue" "$new/rootfs/manager" # as its Deployment calls it
    cp -r "$(go env GOMODCACHE)/$module@v$version/config" "$new/config"
    chmod -R u+w "$new"
    mv "$new" "$cache"
}

manifests() {
    mkdir -p "$cache/config/test"
    # Of all kinds of jobs only RayJobs; the rest of the settings are Kueue's own, its certificates too.
    cat >"$cache/config/test/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../default]
images: [{name: us-central1-docker.pkg.dev/k8s-staging-images/kueue/kueue, newName: ${image%:*}, newTag: "$version"}]
patches:
- target: {kind: ConfigMap, name: kueue-manager-config}
  patch: |
    - op: replace
      path: /data/controller_manager_config.yaml
      value: |
        apiVersion: config.kueue.x-k8s.io/v1beta2
        kind: Configuration
        health: {healthProbeBindAddress: ":8081"}
        metrics: {bindAddress: ":8443"}
        webhook: {port: 9443}
        integrations: {frameworks: [ray.io/rayjob]}
- target: {kind: Deployment, name: kueue-controller-manager}
  patch: |
    - {op: replace, path: /spec/template/spec/containers/0/imagePullPolicy, value: Never}
    - {op: replace, path: /spec/template/spec/containers/0/resources/requests, value: {cpu: 10m, memory: 128Mi}}
    - {op: add, path: /spec/template/spec/nodeSelector, value: {kubernetes.io/hostname: "$1"}}
# Nobody asks its API of who waits, and while that does not answer no namespace can be deleted.
- patch: |
    \$patch: delete
    apiVersion: apiregistration.k8s.io/v1
    kind: APIService
    metadata: {name: v1beta1.visibility.kueue.x-k8s.io}
- patch: |
    \$patch: delete
    apiVersion: apiregistration.k8s.io/v1
    kind: APIService
    metadata: {name: v1beta2.visibility.kueue.x-k8s.io}
YAML
    cat >"$cache/asked.yaml" <<'YAML'
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata: {name: asked}
YAML
}

install() {
    # shellcheck source=/dev/null # the cluster's own names and addresses
    . "$E2E_CLUSTER_TOOLS/lib.sh"
    local first
    first=$(nodes | awk 'NR == 1 { print $2 }')
    # The API server calls webhooks by the address of their service, which only nodes translate.
    in_machine control ip route replace "$SERVICES" via "$(node_ip 1)"
    "$E2E_CLUSTER_TOOLS/load-image" "$cache/rootfs" "$image" --user 65532:65532
    manifests "$first"
    k apply --server-side --force-conflicts -k "$cache/config/test"
    k -n kueue-system rollout status deployment/kueue-controller-manager --timeout=180s
    wait_for 60 "Kueue's webhooks" k create --dry-run=server -f "$cache/asked.yaml"
}

exec >&2
build
[ "${1:-}" = build ] || install
