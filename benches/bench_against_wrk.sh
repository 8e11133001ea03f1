#!/usr/bin/env bash
# Is `evenkeel bench` what is measured? Its rate beside wrk's on the same nginx,
# in turns, 64 kept connections, one thread each; median and range of each.
#
#   cargo build --release && benches/bench_against_wrk.sh [ROUNDS] [SECONDS]
#
# Needs nginx and wrk (Debian: nginx-light, wrk) and a network namespace.
set -euo pipefail
rounds=${1:-5} seconds=${2:-2}
evenkeel=$(cd "$(dirname "$0")/.." && pwd)/target/release/evenkeel
if [ "${INSIDE:-}" != 1 ]; then
  user=()
  [ "$(id -u)" = 0 ] || user=(--user --map-root-user)
  INSIDE=1 exec unshare "${user[@]}" --net "$0" "$rounds" "$seconds"
fi
ip link set lo up
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null; rm -rf "$folder"' EXIT
chmod -R a+rX "$folder"
cat > "$folder/nginx.conf" <<X
daemon off; master_process off; pid $folder/pid; error_log $folder/error.log;
events { worker_connections 1000; }
http { access_log off; keepalive_requests 100000000;
  client_body_temp_path $folder/1; proxy_temp_path $folder/2; fastcgi_temp_path $folder/3;
  uwsgi_temp_path $folder/4; scgi_temp_path $folder/5; server { listen 127.0.0.1:9001; location / { return 200 "ok\n"; } } }
X
PATH="$PATH:/usr/sbin" nginx -c "$folder/nginx.conf" 2>/dev/null &
server=$!
until (exec 3<>/dev/tcp/127.0.0.1/9001) 2>/dev/null; do :; done
for _ in $(seq "$rounds"); do
  wrk -t1 -c64 -d"${seconds}s" http://127.0.0.1:9001/ | awk '/Requests\/sec/ {print $2}' >> "$folder/wrk"
  "$evenkeel" bench tcp 127.0.0.1:9001 --pattern request --payload http --concurrency 64 --threads 1 \
    --duration "${seconds}s" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["rate"]["requests_per_s"])' >> "$folder/bench"
done
for name in wrk bench; do
  sort -n "$folder/$name" | awk -v name="$name" '{a[NR]=$1} END {printf "%-6s median %.0f/s (%.0f to %.0f)\n", name, a[int((NR+1)/2)], a[1], a[NR]}'
done
paste "$folder/wrk" "$folder/bench" | awk '{print $2/$1}' | sort -n | awk '{a[NR]=$1} END {printf "bench/wrk in the same round: median %.2f (%.2f to %.2f)\n", a[int((NR+1)/2)], a[1], a[NR]}'
