#!/usr/bin/env bash
# What a connection costs once more than half of the local ports towards the
# server are taken: CPU of all of the proxy's processes, medians and ranges, for
# evenkeel, and for nginx and HAProxy where they are installed.
#
#   cargo build --release && benches/crowded_ports.sh [ROUNDS] [SECONDS]
#
# One evenkeel answers as the server; the load generator holds 15,000 connections
# to it (half of the range are 14,116 ports), and makes short ones through each
# proxy in turn. Needs python3, 20,000 descriptors and a network namespace.
set -euo pipefail
rounds=${1:-5} seconds=${2:-2}
source "$(dirname "$0")/own_network.sh" "$rounds" "$seconds"
PATH=$PATH:/usr/sbin
ulimit -n "$(ulimit -Hn)"
echo "32768 60999" > /proc/sys/net/ipv4/ip_local_port_range
folder=$(mktemp -d)
all=()
trap 'kill "${all[@]}" 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
listener='[log]
level = "error"
[[listener]]
name = "front"
mode = "tcp"'
cat > "$folder/server.toml" <<X
[daemon]
workers = 2
control_socket = "$folder/server.sock"
$listener
bind = "127.0.0.1:9000"
service = "echo"
X
cat > "$folder/evenkeel.toml" <<X
[daemon]
workers = 2
control_socket = "$folder/evenkeel.sock"
$listener
bind = "127.0.0.1:8000"
upstream = "server"
[[upstream]]
name = "server"
server = [{ address = "127.0.0.1:9000" }]
X
cat > "$folder/nginx.conf" <<X
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
worker_processes 2;
pid $folder/nginx.pid;
error_log $folder/nginx.log;
events { worker_connections 4000; }
stream { server { listen 127.0.0.1:8000 reuseport backlog=4096; proxy_pass 127.0.0.1:9000; } }
X
cat > "$folder/haproxy.cfg" <<X
global
    nbthread 2
    maxconn 4000
listen front
    mode tcp
    timeout connect 3s
    timeout client 1h
    timeout server 1h
    bind 127.0.0.1:8000 backlog 4096 shards by-thread
    server server 127.0.0.1:9000
X
answers() { "$evenkeel" bench tcp "127.0.0.1:$1" --connections 10 > /dev/null 2>&1; }
active() { python3 -c 'import json, sys; print(json.load(sys.stdin)["listeners"][0]["active"])'; }
begin() { # PROXY
  case $1 in
    evenkeel) "$evenkeel" run -c "$folder/evenkeel.toml" & ;;
    nginx) nginx -c "$folder/nginx.conf" & ;;
    haproxy) haproxy -f "$folder/haproxy.cfg" & ;;
  esac 2> /dev/null
  proxy=$!
  all+=("$proxy")
  until answers 8000; do kill -0 "$proxy"; done
}
cpu() {
  for pid in "$proxy" $(cat /proc/"$proxy"/task/*/children); do cat /proc/"$pid"/task/*/schedstat; done |
    awk '{sum += $1} END {printf "%d", sum / 1000}'
}
measure() { # FILE
  local before
  before=$(cpu)
  "$evenkeel" bench tcp 127.0.0.1:8000 --pattern connect --duration "${seconds}s" --json > "$folder/out" 2> /dev/null
  python3 - "$folder/out" "$(($(cpu) - before))" >> "$folder/$1" <<'X'
import json, sys
print(int(sys.argv[2]) / json.load(open(sys.argv[1]))["connections"])
X
}
median() { sort -n | awk '{a[NR] = $1} END {printf "%.0f (%.0f to %.0f)", a[int((NR + 1) / 2)], a[1], a[NR]}'; }
"$evenkeel" run -c "$folder/server.toml" 2> /dev/null & all+=($!)
until answers 9000; do kill -0 "${all[0]}"; done
proxies=(evenkeel)
[ ! -e /usr/lib/nginx/modules/ngx_stream_module.so ] || proxies+=(nginx)
! command -v haproxy > /dev/null || proxies+=(haproxy)
for held in 0 15000; do
  if [ "$held" != 0 ]; then
    "$evenkeel" bench tcp 127.0.0.1:9000 --pattern request --rate 2000 --connections "$held" --duration 1h > /dev/null 2>&1 & all+=($!)
    until [ "$("$evenkeel" status --json --socket "$folder/server.sock" | active)" -ge "$held" ]; do kill -0 "${all[-1]}"; done
  fi
  for _ in $(seq "$rounds"); do
    for name in "${proxies[@]}"; do
      begin "$name"
      measure "$name.$held"
      kill "$proxy"
      wait "$proxy" || true
    done
  done
  for name in "${proxies[@]}"; do echo "$held held, $name: $(median < "$folder/$name.$held") us a connection"; done
done
