# Turns YAML in the plain form that k8s/ is written in (blocks, one key or item a line; no anchors, no block scalars) into lines
#   FILE|DOCUMENT|PATH|VALUE        e.g. base/worker.yaml|1|spec.template.spec.containers[0].name|worker
# and ends with status 2 at a line that it cannot read.
function trim(text) { sub(/^ +/, "", text); sub(/ +$/, "", text); return text }
function plain(text) {
  text = trim(text)
  if (text ~ /^".*"$/ || text ~ /^'.*'$/) text = substr(text, 2, length(text) - 2)
  return text
}
function path(    i, text) {
  text = ""
  for (i = 1; i <= depth; i++) {
    if (is_list[i]) text = text "[" item[i] "]"
    else text = text (i > 1 ? "." : "") name[i]
  }
  return text
}
function emit(value) { print FILENAME "|" document "|" path() "|" plain(value) }
function push(at, list, text) { depth++; indent[depth] = at; is_list[depth] = list; name[depth] = text; item[depth] = 0 }
FNR == 1 { document = 1; depth = 0 }
/^ *(#.*)?$/ { next }
/^---/ { document++; depth = 0; next }
{
  line = $0
  if (line !~ /"/) sub(/ #.*/, "", line)
  match(line, /^ */)
  at = RLENGTH
  rest = substr(line, at + 1)
  while (rest ~ /^- /) {
    while (depth > 0 && indent[depth] > at) depth--
    if (depth > 0 && is_list[depth] && indent[depth] == at) item[depth]++
    else push(at, 1, "")
    rest = substr(rest, 3); at += 2
  }
  if (rest ~ /^[A-Za-z0-9_.\/-]+:( |$)/) {
    colon = index(rest, ":")
    while (depth > 0 && (indent[depth] > at || indent[depth] == at)) depth--
    push(at, 0, substr(rest, 1, colon - 1))
    value = trim(substr(rest, colon + 1))
    if (value != "") emit(value)
  } else if (depth > 0 && is_list[depth]) {
    emit(rest)
  } else {
    print FILENAME ":" FNR ": not in the plain form that tests/k8s/flatten.awk reads: " $0 > "/dev/stderr"
    exit 2
  }
}
