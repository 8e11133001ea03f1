#!/usr/bin/env bash
# What more workers change, and what more sessions: CPU time of all of the
# daemon's processes for a connection, an exchange and a datagram's answer.
# Medians and ranges.
#
#   cargo build --release && benches/scale.sh [ROUNDS] [SECONDS]
#
# The daemon answers by itself (`service = "echo"`), so nobody else shares the
# CPUs but the client. Sessions go as far as 20,000 descriptors in the client
# and in each of two workers allow; all of them are asked in turn, at the same
# rate in all. Needs python3 and a network namespace.
set -euo pipefail
rounds=${1:-5} seconds=${2:-1}
source "$(dirname "$0")/own_network.sh" "$rounds" "$seconds"
folder=$(mktemp -d)
daemon=
trap '[ -z "$daemon" ] || kill "$daemon" 2>/dev/null; wait; rm -rf "$folder"' EXIT
begin() { # WORKERS [MODES]
  cat > "$folder/evenkeel.toml" <<X
[daemon]
workers = $1
drain_timeout = "1s"
control_socket = "$folder/control.sock"
[log]
level = "warn"
X
  for mode in ${2:-tcp udp}; do
    printf '[[listener]]\nname = "%s"\nmode = "%s"\nbind = "127.0.0.1:8000"\nservice = "echo"\n' $mode $mode
  done >> "$folder/evenkeel.toml"
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
memory() { for pid in $(processes); do cat /proc/"$pid"/smaps_rollup; done | awk '/^Pss:/ {sum += $2} END {print sum * 1024}'; }
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
# So many sessions: the CPU microseconds of an exchange, from a longer run and a
# shorter one, so that what opening them costs is in neither; and the memory of one.
sessions() { # COUNT
  local count=$1 before empty
  for time in 4 8; do
    begin 2 tcp
    empty=$(memory) before=$(cpu)
    "$evenkeel" bench tcp 127.0.0.1:8000 --pattern request --rate 10000 --connections "$count" \
      --duration "${time}s" --json > "$folder/out.$time" 2> /dev/null & client=$!
    if [ "$time" = 8 ]; then
      until [ "$("$evenkeel" status --json --socket "$folder/control.sock" | active)" = "$count" ]; do kill -0 "$client"; done
      echo "$(($(memory) - empty)) $count" | awk '{print $1 / $2}' >> "$folder/memory.$count"
    fi
    wait "$client"
    echo "$(($(cpu) - before))" > "$folder/used.$time"
    end
  done
  python3 - "$folder" >> "$folder/exchange.$count" <<'X'
import json, sys
used, done = [
    [of(open(f"{sys.argv[1]}/{name}.{time}")) for time in (4, 8)]
    for name, of in (("used", lambda file: int(file.read())), ("out", lambda file: json.load(file)["requests"]))
]
print((used[1] - used[0]) / (done[1] - done[0]))
X
}
active() { python3 -c 'import json, sys; print(json.load(sys.stdin)["listeners"][0]["active"])'; }
median() { sort -n | awk '{a[NR] = $1} END {printf "%.1f (%.1f to %.1f)", a[int((NR + 1) / 2)], a[1], a[NR]}'; }
show() { # FILE
  echo "$(median < "$folder/$1") ${2:-us}"
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
ulimit -n "$(ulimit -Hn)"
counts="100 1000 10000 19000"
for _ in $(seq "$rounds"); do
  for count in $counts; do sessions "$count"; done
done
for count in $counts; do
  echo "$count sessions, 10,000 exchanges/s: $(show "exchange.$count")"
done
# Of fewer, what a program gives back behind its start is more than they take.
for count in 10000 19000; do echo "$count sessions: $(show "memory.$count" bytes) each"; done
