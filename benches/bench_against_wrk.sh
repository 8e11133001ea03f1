#!/usr/bin/env bash
# Is `evenkeel bench` what is measured? Its rate beside wrk's on the same nginx,
# in turns, 64 kept connections, one thread each; median and range of each, of
# the rate and of the client's CPU time for an exchange, on all cores and on one.
#
#   cargo build --release && benches/bench_against_wrk.sh [ROUNDS] [SECONDS]
#
# Needs nginx and wrk (Debian: nginx-light, wrk) and a network namespace.
set -euo pipefail
rounds=${1:-5} seconds=${2:-2}
source "$(dirname "$0")/own_network.sh" "$rounds" "$seconds"
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
# One program's rate, and the CPU time of its process for an exchange: the
# latter hardly moves with what else the machine does.
measure() { # NAME TASKSET-CPUS
  local name=$1 pin=() rate count
  [ -z "$2" ] || pin=(taskset -c "$2")
  TIMEFORMAT='%U %S'
  case $name in
    wrk) { time "${pin[@]}" wrk -t1 -c64 -d"${seconds}s" http://127.0.0.1:9001/ > "$folder/out"; } 2> "$folder/time"
      rate=$(awk '/Requests\/sec/ {print $2}' "$folder/out")
      count=$(awk '/requests in/ {print $1}' "$folder/out") ;;
    bench) { time "${pin[@]}" "$evenkeel" bench tcp 127.0.0.1:9001 --pattern request --payload http --concurrency 64 \
        --threads 1 --duration "${seconds}s" --json > "$folder/out" 2> /dev/null; } 2> "$folder/time"
      rate=$(python3 -c 'import json,sys; print(json.load(sys.stdin)["rate"]["requests_per_s"])' < "$folder/out")
      count=$(awk -v r="$rate" -v s="$seconds" 'BEGIN {print r * s}') ;;
  esac
  echo "$rate" >> "$folder/$name.rate"
  tail -n1 "$folder/time" | awk -v n="$count" '{printf "%.3f\n", ($1 + $2) * 1e6 / n}' >> "$folder/$name.cpu"
}
median() { sort -n | awk -v unit="$1" '{a[NR]=$1} END {printf "median %.2f%s (%.2f to %.2f)", a[int((NR+1)/2)], unit, a[1], a[NR]}'; }
compare() { # TITLE TASKSET-CPUS
  rm -f "$folder"/*.rate "$folder"/*.cpu
  for _ in $(seq "$rounds"); do measure wrk "$2"; measure bench "$2"; done
  echo "$1"
  for name in wrk bench; do
    echo "  $name: $(median /s < "$folder/$name.rate"), CPU of an exchange $(median " us" < "$folder/$name.cpu")"
  done
  echo "  bench/wrk in the same round: rate $(paste "$folder"/{wrk,bench}.rate | awk '{print $2/$1}' | median "")," \
    "CPU $(paste "$folder"/{wrk,bench}.cpu | awk '{print $2/$1}' | median "")"
}
compare "wherever the kernel puts them" ""
# One core for both: what the one does not use the other one has.
core=$(taskset -pc $$ | sed 's/.*: //; s/[-,].*//')
taskset -pc "$core" "$server" > /dev/null
compare "client and server share core $core" "$core"
