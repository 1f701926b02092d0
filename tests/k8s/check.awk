# Compares the manifests (lines of flatten.awk) with facts about the programs: lines fact|KIND|... that come first.
#   fact|flag|PROGRAM|VARIABLE|required or optional    fact|health|NAME       fact|target|ROLE       fact|version|NUMBER
#   fact|last_resort|PROGRAM|SECONDS                   fact|recipe|NAME       fact|file|PATH   PATH below k8s/ exists
# Prints each violation; status 1 when there is one.
BEGIN { FS = "|" }
function complain(file, text) { print "k8s/" file ": " text; bad++ }
function get(id, path) { return ((id SUBSEP path) in value) ? value[id, path] : "" }
function has(id, path) { return (id SUBSEP path) in value }
function folder_of(file) { sub(/\/[^\/]*$/, "", file); return file }
function before(text, mark) { return substr(text, 1, index(text, mark) - 1) }
function port_of(address) { sub(/.*:/, "", address); return address }
function index_in(path, word,    rest) { rest = path; sub(".*" word "\\[", "", rest); sub(/\].*/, "", rest); return rest }
# Value of a variable of a program in an overlay: the overlay's own, or the base's.
function setting(folder, program, key) {
  if ((folder, program, key) in config) return config[folder, program, key]
  return (("base", program, key) in config) ? config["base", program, key] : ""
}
function variable_of(flag) { sub(/^--/, "", flag); sub(/=.*/, "", flag); gsub(/-/, "_", flag); return "SLUICE_" toupper(flag) }
# Bytes of 3GiB, 4Gi, 1536Mi.
function bytes(text,    number) {
  number = text + 0
  if (text ~ /Gi/) return number * 1073741824
  if (text ~ /Mi/) return number * 1048576
  return number
}
# A port of a *LISTEN variable at which the program listens for others; several workers of a pod take the ports that follow.
function listens(program, port,    key, part) {
  for (key in config) {
    split(key, part, SUBSEP)
    if (part[1] == "base" && part[2] == program && part[3] ~ /LISTEN$/ && config[key] !~ /^(127\.|localhost)/ &&
        port >= port_of(config[key]) + 0 && port <= port_of(config[key]) + (program == "sluice-worker" ? 7 : 0)) return 1
  }
  return 0
}
function check_key(file, program, key, where) {
  if (!(program in programs)) complain(file, where " belongs to no program: \"" program "\"")
  else if (!((program, key) in flag)) complain(file, key " (" where ") is no flag of " program)
  else given[program, key] = 1
}
$1 == "fact" && $2 == "flag" { flag[$3, $4] = $5; programs[$3] = 1; next }
$1 == "fact" && $2 == "health" { health[$3] = 1; next }
$1 == "fact" && $2 == "target" { target[$3] = 1; next }
$1 == "fact" && $2 == "version" { version = $3; next }
$1 == "fact" && $2 == "last_resort" { last_resort[$3] = $4; next }
$1 == "fact" && $2 == "recipe" { recipe[$3] = 1; next }
$1 == "fact" && $2 == "file" { exists[$3] = 1; next }
{
  id = $1 "|" $2
  value[id, $3] = $4
  n++; file[n] = $1; doc[n] = id; path[n] = $3; text[n] = $4
  if ($3 == "kind") kind[id] = $4
  if ($3 ~ /\.template\.metadata\.labels\./) { label = $3; sub(/.*\.labels\./, "", label); pod_label[id, label "=" $4] = 1; pods[id] = 1 }
  if ($3 == "metadata.name") object_name[id] = $4
}
# Pods that carry the label; remembers the last one's program.
function pods_with(label,    id, count) {
  for (id in pods) if ((id, label) in pod_label) { count++; found_pod = id }
  return count
}
function check_selector(i,    label) {
  label = path[i]; sub(/.*(matchLabels|selector)\./, "", label)
  label = label "=" text[i]
  # Pods of another namespace, Prometheus for one, are not ours to know.
  if (has(doc[i], before(path[i], "podSelector") "namespaceSelector.matchLabels.kubernetes.io/metadata.name")) return
  if (label !~ /^(kubernetes\.io\/metadata\.name|sluice-client)/ && !pods_with(label)) complain(file[i], "no pod has the label " label)
}
function check_service(id, f,    label, p, port, k, target_port, match_port) {
  label = get(id, "spec.selector.app.kubernetes.io/name")
  if (!pods_with("app.kubernetes.io/name=" label)) return
  for (p = 0; has(id, "spec.ports[" p "].port"); p++) {
    port = get(id, "spec.ports[" p "].port"); target_port = get(id, "spec.ports[" p "].targetPort"); match_port = ""
    for (k = 0; has(found_pod, "spec.template.spec.containers[0].ports[" k "].containerPort"); k++)
      if (get(found_pod, "spec.template.spec.containers[0].ports[" k "].name") == target_port)
        match_port = get(found_pod, "spec.template.spec.containers[0].ports[" k "].containerPort")
    if (match_port != port) complain(f, "Service " object_name[id] ": port " port " is not the port of " label " called " target_port)
    service_port[object_name[id], port] = label
  }
}
function check_address(i, key, address, program, listen_key,    host, port) {
  host = before(address, ":"); port = port_of(address)
  if (service_port[host, port] != program) complain(file[i], key "=" address " is no Service of " program)
  else if (port != port_of(setting("base", program, listen_key))) complain(file[i], key "=" address " is not the port of " listen_key " of " program)
}
function check_policy(id, f,    side, far, r, p, port, label, program) {
  for (side = 0; side < 2; side++)
    for (r = 0; has(id, (side ? "spec.egress[" : "spec.ingress[") r "].ports[0].port"); r++)
      for (p = 0; has(id, (far = (side ? "spec.egress[" : "spec.ingress[") r "]") ".ports[" p "].port"); p++) {
        port = get(id, far ".ports[" p "].port")
        program = get(id, side ? far ".to[0].podSelector.matchLabels.app.kubernetes.io/name" : "spec.podSelector.matchLabels.app.kubernetes.io/name")
        if (port != 53 && program in programs && !listens(program, port)) complain(f, "NetworkPolicy " object_name[id] ": " program " does not listen on " port)
        if (!side && !program) for (program in programs)  # A way into all of them
          if (!listens(program, port)) complain(f, "NetworkPolicy " object_name[id] ": " program " does not listen on " port)
        if (!side) open_from[id, port] = 1
      }
}
function check_pod(id, f,    base, c, program, sleep_s, drain_s, grace, needed) {
  base = "spec.template.spec"
  if (get(id, base ".enableServiceLinks") != "false") complain(f, object_name[id] ": enableServiceLinks must be false: a Service's variable could be taken for a flag")
  if (get(id, base ".securityContext.runAsNonRoot") != "true" || get(id, base ".securityContext.seccompProfile.type") != "RuntimeDefault")
    complain(f, object_name[id] ": not restricted: runAsNonRoot, seccompProfile")
  c = base ".containers[0]"
  if (get(id, c ".securityContext.allowPrivilegeEscalation") != "false" || get(id, c ".securityContext.capabilities.drop[0]") != "ALL")
    complain(f, object_name[id] ": not restricted: allowPrivilegeEscalation, capabilities")
  program = "sluice-" get(id, c ".name")
  if (!(program in programs)) return
  if (get(id, c ".envFrom[0].configMapRef.name") != program) complain(f, object_name[id] ": envFrom must be the ConfigMap " program)
  if (setting("base", program, "SLUICE_LISTEN") ~ /^(127\.|localhost)/) complain(f, program " listens on loopback, where no probe reaches it")
  if (get(id, c ".readinessProbe.grpc.service") == "" || get(id, c ".livenessProbe.grpc.service") != "live")
    complain(f, object_name[id] ": needs a readiness probe, and a liveness probe of the service live")
  sleep_s = get(id, c ".lifecycle.preStop.exec.command[0]") == "sleep" ? get(id, c ".lifecycle.preStop.exec.command[1]") : 0
  drain_s = setting("base", program, "SLUICE_DRAIN_MS") / 1000
  grace = get(id, base ".terminationGracePeriodSeconds"); needed = sleep_s + drain_s + last_resort[program]
  if (grace + 0 < needed) complain(f, object_name[id] ": terminationGracePeriodSeconds " grace " is less than preStop " sleep_s " + drain " drain_s " + last resort " last_resort[program])
}
# Metrics of a program: one port in the flag, the container's port of that name, the annotation and the NetworkPolicy for Prometheus.
function check_metrics(id, f, program,    port, k, key, part, open) {
  port = port_of(setting("base", program, "SLUICE_METRICS_LISTEN"))
  for (k = 0; has(id, "spec.template.spec.containers[0].ports[" k "].containerPort"); k++)
    if (get(id, "spec.template.spec.containers[0].ports[" k "].name") == "metrics" &&
        get(id, "spec.template.spec.containers[0].ports[" k "].containerPort") == port) open = 1
  if (!port || !open) complain(f, program ": no container port called metrics with the port of SLUICE_METRICS_LISTEN")
  if (get(id, "spec.template.metadata.annotations.prometheus.io/port") != port || get(id, "spec.template.metadata.annotations.prometheus.io/scrape") != "true")
    complain(f, program ": annotations prometheus.io/scrape and port do not fit SLUICE_METRICS_LISTEN")
  for (key in open_from) {
    split(key, part, SUBSEP)
    if (part[2] == port && get(part[1], "spec.podSelector.matchLabels.app.kubernetes.io/part-of") == "sluice") return
  }
  complain(f, program ": no NetworkPolicy lets Prometheus reach port " port)
}
# Of each overlay as a whole.
function check_overlay(folder,    workers, replicas, group, limit, memory) {
  workers = setting(folder, "sluice-controller", "SLUICE_WORKERS")
  replicas = (folder in replicas_of) ? replicas_of[folder] : replicas_of["base"]
  group = (folder in group_of) ? group_of[folder] : 1
  if (workers != replicas * group) complain(folder, "SLUICE_WORKERS=" workers ", but there are " replicas " pods of " group)
  limit = (folder in memory_of) ? memory_of[folder] : memory_of["base"]
  memory = setting(folder, "sluice-worker", "SLUICE_MEMORY")
  if (setting(folder, "sluice-worker", "SLUICE_DEVICE") == "cpu" && bytes(memory) * 1.25 > bytes(limit))
    complain(folder, "SLUICE_MEMORY=" memory " leaves less than a fifth of limits.memory " limit " to the process itself")
}
# The load test's Job: its two variables.
function check_load(i, key, value) {
  if (key == "ADDRESS") check_address(i, key, value, "sluice-controller", "SLUICE_LISTEN")
  else if (key != "RECIPE") complain(file[i], key " is no variable of the load test")
  else if (!(value in recipe)) complain(file[i], "tests/load has no recipe " value)
}
function check_line(i,    p, t, f, id, c, program, key, role, generator) {
  p = path[i]; t = text[i]; f = file[i]; id = doc[i]
  program = ""
  if (p ~ /containers\[[0-9]+\]/) program = "sluice-" get(id, "spec.template.spec.containers[" index_in(p, "containers") "].name")
  generator = p ~ /^configMapGenerator.*literals\[/ ? get(id, "configMapGenerator[" index_in(p, "configMapGenerator") "].name") : ""
  if (generator == "sluice-load") check_load(i, before(t, "="), substr(t, index(t, "=") + 1))
  else if (generator != "") check_key(f, generator, before(t, "="), "ConfigMap")
  if (p ~ /\.env\[[0-9]+\]\.name$/ && t ~ /^SLUICE_/) check_key(f, program, t, "env")
  if (p ~ /containers\[[0-9]+\]\.(args|command)\[/ && t ~ /^--/ && program in programs) check_key(f, program, variable_of(t), t)
  if (p ~ /Probe\.grpc\.service$/ && !(t in health)) complain(f, "probe of the health service \"" t "\", which no program has")
  if (p ~ /Probe\.grpc\.port$/ && t != port_of(setting("base", program, "SLUICE_LISTEN"))) complain(f, "probe port " t " is not the port of SLUICE_LISTEN of " program)
  if (p ~ /containerPort$/ && !listens(program, t)) complain(f, program " does not listen on containerPort " t)
  if (p ~ /\.image$/ || p ~ /^images\[[0-9]+\]\.(name|newName)$/) {
    role = t; sub(/:.*/, "", role); sub(/.*\//, "", role)
    if (!(role in target)) complain(f, "image " t ": the Dockerfile has no target " role)
    if (p ~ /\.image$/ && t !~ (":" version "$")) complain(f, "image " t " is not pinned to version " version)
  }
  if (p ~ /(matchLabels|spec\.selector)\./) check_selector(i)
  if (p ~ /^(resources|components)\[|^patches\[[0-9]+\]\.path$/) {
    key = folder_of(f) "/" t
    while (key ~ /[^\/]+\/\.\.\//) sub(/[^\/.]+\/\.\.\//, "", key)
    if (!(key in exists)) complain(f, t " is not there")
  }
  if (p ~ /^spec\.podMetricsEndpoints.*port$/ && !(t in port_names)) complain(f, "no container has a port called " t)
  if (p == "spec.serviceName" && !(t in headless)) complain(f, "serviceName " t " is no headless Service")
  if (p ~ /^configMapGenerator.*literals\[/ || p ~ /\.env\[[0-9]+\]\.value$/) {
    key = p ~ /literals/ ? before(t, "=") : get(id, substr(p, 1, length(p) - 5) "name")
    c = p ~ /literals/ ? substr(t, index(t, "=") + 1) : t
    if (key == "SLUICE_CONTROLLER" || key == "SLUICE_INTERNAL_ADVERTISE") check_address(i, key, c, "sluice-controller", "SLUICE_INTERNAL_LISTEN")
    if (key == "SLUICE_LOADER") check_address(i, key, c, "sluice-loader", "SLUICE_LISTEN")
  }
}
END {
  if (!n || !version) { print "nothing to check"; exit 2 }
  for (i = 1; i <= n; i++) {
    folder = folder_of(file[i])
    if (path[i] ~ /^configMapGenerator.*literals\[/)
      config[folder, get(doc[i], "configMapGenerator[" index_in(path[i], "configMapGenerator") "].name"), before(text[i], "=")] = substr(text[i], index(text[i], "=") + 1)
    if (kind[doc[i]] == "StatefulSet" && path[i] == "spec.replicas") replicas_of[folder] = text[i]
    if (kind[doc[i]] == "StatefulSet" && path[i] ~ /limits\.memory$/) memory_of[folder] = text[i]
    if (text[i] == "WORKER_GROUP_SIZE") group_of[folder] = get(doc[i], substr(path[i], 1, length(path[i]) - 4) "value")
    if (file[i] ~ /^overlays\//) overlays[folder] = 1
    if (path[i] ~ /containers\[0\]\.ports\[[0-9]+\]\.name$/) port_names[text[i]] = 1
    if (kind[doc[i]] == "Service" && path[i] == "spec.clusterIP" && text[i] == "None") headless[object_name[doc[i]]] = 1
    file_of[doc[i]] = file[i]
  }
  for (id in kind) if (kind[id] == "Service") check_service(id, file_of[id])
  for (i = 1; i <= n; i++) check_line(i)
  for (id in pods) check_pod(id, file_of[id])
  for (id in kind) if (kind[id] == "NetworkPolicy") check_policy(id, file_of[id])
  for (id in pods) {
    program = "sluice-" get(id, "spec.template.spec.containers[0].name")
    if (program in programs) check_metrics(id, file_of[id], program)
  }
  for (folder in overlays) check_overlay(folder)
  for (key in flag) {
    split(key, pair, SUBSEP)
    if (flag[key] == "required" && !(key in given) && pair[1] != "sluice") complain("base", pair[1] " is not given " pair[2] ", which it requires")
  }
  printf "%d values, %d violations\n", n, bad
  exit bad > 0
}
