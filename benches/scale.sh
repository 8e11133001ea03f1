#!/usr/bin/env bash
# What more workers change: CPU time of all of the daemon's processes for a
# connection, an exchange and a datagram's answer. Medians and ranges.
#
#   cargo build --release && benches/scale.sh [ROUNDS] [SECONDS]
#
# The daemon answers by itself (`service = "echo"`), so nobody else shares the
# CPUs but the client. Needs python3 and a network namespace.
set -euo pipefail
rounds=${1:-5} seconds=${2:-1}
source "$(dirname "$0")/own_network.sh" "$rounds" "$seconds"
folder=$(mktemp -d)
daemon=
trap '[ -z "$daemon" ] || kill "$daemon" 2>/dev/null; wait; rm -rf "$folder"' EXIT
begin() { # WORKERS
  cat > "$folder/evenkeel.toml" <<X
[daemon]
workers = $1
drain_timeout = "1s"
control_socket = "$folder/control.sock"
[log]
level = "warn"
[[listener]]
name = "echo"
mode = "tcp"
bind = "127.0.0.1:8000"
service = "echo"
[[listener]]
name = "datagrams"
mode = "udp"
bind = "127.0.0.1:8000"
service = "echo"
X
  "$evenkeel" run -c "$folder/evenkeel.toml" 2> "$folder/log" & daemon=$!
  until "$evenkeel" bench tcp 127.0.0.1:8000 --connections 10 > /dev/null 2>&1; do kill -0 "$daemon"; done
}
end() {
  kill "$daemon"
  wait "$daemon" || true
  daemon=
}
processes() { echo "$daemon" $(cat /proc/"$daemon"/task/*/children); }
cpu() { for pid in $(processes); do cat /proc/"$pid"/task/*/schedstat; done | awk '{sum += $1} END {printf "%d", sum / 1000}'; }
# The CPU microseconds of the daemon for each of what the client counted.
measure() { # FILE WHAT MODE MORE...
  local file=$1 what=$2 mode=$3 before
  shift 3
  before=$(cpu)
  "$evenkeel" bench "$mode" 127.0.0.1:8000 --duration "${seconds}s" --json "$@" > "$folder/out" 2> /dev/null
  python3 - "$folder/out" "$what" "$(($(cpu) - before))" >> "$folder/$file" <<'X'
import json, sys
result = json.load(open(sys.argv[1]))
print(int(sys.argv[3]) / result[sys.argv[2]])
X
}
median() { sort -n | awk '{a[NR] = $1} END {printf "%.1f (%.1f to %.1f)", a[int((NR + 1) / 2)], a[1], a[NR]}'; }
show() { # FILE
  echo "$(median < "$folder/$1") us"
}
for _ in $(seq "$rounds"); do
  for workers in 1 2 4 8; do
    begin "$workers"
    measure "connect.$workers" connections tcp --pattern connect
    measure "request.$workers" requests tcp --pattern request --connections 64
    measure "udp.$workers" requests udp --pattern request --connections 64
    end
  done
done
for kind in connect request udp; do
  for workers in 1 2 4 8; do echo "$kind, $workers workers: $(show "$kind.$workers")"; done
done
