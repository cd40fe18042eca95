# What scripts/brokers and scripts/stores share: installing, and keeping private servers by pid. Sourced, not run.
# shellcheck shell=bash

SELF=$(readlink -f "$0")
NAME=$(basename "$SELF")
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/guestlist
SERVERS_DIR=${GUESTLIST_SERVERS_DIR:-$CACHE/servers}
SUITE=forky
# The number grows with the list of packages, so that a folder of an older list is not taken for this one.
ROOTFS=$SERVERS_DIR/rootfs-2
CURRENT_PACKAGES=rabbitmq-server,nats-server,valkey-server,postgresql

fail() { echo "$NAME: $*" >&2; exit 1; }
usage() { sed -n '2,/^set -/{/^#/p}' "$SELF" >&2; exit 2; }
generation() { case "$1" in distribution|current) ;; *) fail "'$1' is neither distribution nor current" ;; esac; }

# ---------------------------------------------------------------- install

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else fail "root is needed for: $*"; fi
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }

# By name: pgrep -u refuses a user that is not there (yet).
service_processes() {
  local user
  for user in rabbitmq epmd nats redis postgres; do
    ! id "$user" >/dev/null 2>&1 || pgrep -u "$user" || true
  done
}

# The packages must not start their services: the tests want private brokers only.
apt_install() {
  command -v apt-get >/dev/null || fail "no apt-get here; install $* yourself"
  local policy=/usr/sbin/policy-rc.d made=no before log pid
  before=" $(service_processes | tr '\n' ' ')"
  log=$(mktemp)
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null; as_root chmod 755 $policy; made=yes
  fi
  local ok=no
  if apt install -y --no-install-recommends "$@" >"$log" 2>&1; then ok=yes
  else
    # Package lists may be missing or old, and an update by another process can delete archives in mid-install.
    { as_root dpkg --configure -a; apt update; apt install -f -y; } >>"$log" 2>&1 || true
    if apt install -y --no-install-recommends "$@" >>"$log" 2>&1; then ok=yes; fi
  fi
  [ $made = no ] || as_root rm -f $policy
  for pid in $(service_processes); do
    case "$before" in *" $pid "*) ;; *) as_root kill "$pid" 2>/dev/null || true ;; esac
  done
  [ $ok = yes ] || { tail -20 "$log" >&2; rm -f "$log"; fail "apt-get could not install $*"; }
  rm -f "$log"
}

mirror() {
  local uri
  uri=$({ sed -n 's/^URIs:[[:space:]]*\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/debian.sources
    sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list; } 2>/dev/null |
    grep '/debian/\{0,1\}$' | head -1) || true
  echo "${uri:-http://deb.debian.org/debian}"
}

missing_tools() { # the packages
  command -v openssl >/dev/null || echo openssl
  command -v python3 >/dev/null || echo python3-minimal
  command -v pgrep >/dev/null || echo procps
}

install_current() {
  local new=$ROOTFS.new
  [ -x /usr/sbin/debootstrap ] || apt_install debootstrap
  [ -e /usr/share/debootstrap/scripts/$SUITE ] || as_root ln -s sid /usr/share/debootstrap/scripts/$SUITE
  as_root rm -rf --one-file-system "$new"
  # A mount namespace of its own: what debootstrap mounts is gone with it, however it ends.
  as_root unshare --mount --propagation private debootstrap --variant=minbase \
    --include=$CURRENT_PACKAGES "$SUITE" "$new" "$(mirror)" >"$SERVERS_DIR/debootstrap.log" 2>&1 ||
    { tail -20 "$SERVERS_DIR/debootstrap.log" >&2; fail "debootstrap failed, see $SERVERS_DIR/debootstrap.log"; }
  as_root mkdir -p "$new/guestlist"   # for a running server DIR is mounted here
  as_root touch "$new/etc/hosts"      # and a file of ours here
  as_root rm -rf "$new"/var/cache/apt/archives/*.deb "$new"/var/lib/apt/lists/*
  as_root mv "$new" "$ROOTFS"
}

install() { # GENERATION; the script says what distribution_packages and PRESENT_IN_ROOTFS are
  generation "$1"
  mkdir -p "$SERVERS_DIR" "$CACHE"
  if "$1_present" && [ -z "$(missing_tools)" ]; then return; fi
  (
    flock 9
    mapfile -t tools < <(missing_tools)
    [ ${#tools[@]} = 0 ] || apt_install "${tools[@]}"
    "$1_present" || case $1 in
      distribution) install_distribution ;;
      current) install_current ;;
    esac
  ) 9>"$CACHE/install.lock"
  "$1_present" || fail "something ($1) is still missing after the installation"
}

packages() { mkdir -p "$CACHE"; ( flock 9; apt_install "$@" ) 9>"$CACHE/install.lock"; }

# ---------------------------------------------------------------- processes

# Field of /proc/PID/stat counted after the program's name, which may hold spaces: 1 state, 20 start time.
stat_field() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; local f; read -ra f <<<"$s"; echo "${f[$2 - 1]}"; }

remember_pid() { # DIR NAME PID; the start time tells the process from a later one with the same pid
  mkdir -p "$1/pids"; echo "$3 $(stat_field "$3" 20)" >"$1/pids/$2"
}

alive() { # DIR NAME: prints the pid
  local pid start state
  [ -e "$1/pids/$2" ] && read -r pid start <"$1/pids/$2" || return 1
  [ "$(stat_field "$pid" 20)" = "$start" ] || return 1
  state=$(stat_field "$pid" 1) && [ "$state" != Z ] || return 1
  echo "$pid"
}

descendants() { # PID: lines of pid and start time
  local p
  for p in $(pgrep -P "$1" || true); do echo "$p $(stat_field "$p" 20 || true)"; descendants "$p"; done
}

still_there() { # the lines of descendants that have not ended
  local pid start
  while read -r pid start; do
    [ -z "$start" ] || [ "$(stat_field "$pid" 20)" != "$start" ] || [ "$(stat_field "$pid" 1)" = Z ] || echo "$pid"
  done <<<"$1"
}

wait_gone() { # SECONDS COMMAND...: until COMMAND prints nothing
  local end=$((SECONDS + $1)); shift
  while [ -n "$("$@" || true)" ]; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}

end_server() { # DIR NAME [SIGNAL]
  local pid children p
  if pid=$(alive "$1" "$2"); then
    children=$(descendants "$pid")
    kill -"${3:-TERM}" "$pid" 2>/dev/null || true
    wait_gone 15 alive "$1" "$2" || { kill -KILL "$pid" 2>/dev/null || true; wait_gone 5 alive "$1" "$2" || true; }
    # The Erlang machine's child processes and epmd end with it; this is for the case that one does not.
    wait_gone 3 still_there "$children" || for p in $(still_there "$children"); do kill -KILL "$p" 2>/dev/null || true; done
    wait_gone 3 still_there "$children" || true
  fi
  rm -f "$1/pids/$2"
}

start_in_background() { # NAME GENERATION PORT DIR [CONFIG]
  # With setsid, Ctrl-C in the caller's terminal does not reach the server before the tests are over.
  setsid "$SELF" run "$@" >"$4/$1.out" 2>&1 </dev/null 9>&- &
  remember_pid "$4" "$1" $!
}

await() { # amqp|nats|redis|postgres PORT SECONDS NAME DIR
  tool wait "$1" "$2" "$(cut -d' ' -f1 "$5/pids/$4")" "$3" || {
    echo "$NAME: $4 did not answer on 127.0.0.1:$2 within $3 s, or ended; its log's last lines:" >&2
    tail -n 25 "$5/$4.out" "$5/$4.log" >&2 2>/dev/null || true
    exit 1
  }
}

# ---------------------------------------------------------------- small tools in python

tool() { # ports COUNT | wait amqp|nats|redis|postgres PORT PID SECONDS | version amqp|nats|redis|postgres URL
  python3 - "$@" <<'EOF'
import json, random, re, signal, socket, sys, time
from urllib.parse import urlsplit

signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends on Ctrl-C without a traceback

def free(port):
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return None
        return s.getsockname()[1]

# Below the range of outgoing connections: there, while a broker is down for a restart, a client's reconnect
# can be given the broker's own port as its source, connects to itself and keeps the broker from coming back.
def ports(count):
    try:
        low = int(open("/proc/sys/net/ipv4/ip_local_port_range").read().split()[0])
    except OSError:
        low = 32768
    found = set()
    for _ in range(1000):
        if len(found) < count:
            p = free(random.randrange(12000, low)) if low > 13000 else free(0)
            found |= {p} if p else set()
    return found

PORTS = {"amqp": 5672, "nats": 4222, "redis": 6379, "postgres": 5432}

def first_words(kind):
    """What to say to a server, and when its answer is whole."""
    if kind == "nats":
        return b"", lambda data: data.endswith(b"\r\n")
    if kind == "redis":
        # $LENGTH, and as many bytes.
        whole = lambda data: b"\r\n" in data and len(data) >= data.index(b"\r\n") + int(data[1:data.index(b"\r\n")]) + 4
        return b"INFO\r\n", lambda data: data[:1] == b"-" or whole(data)
    if kind == "postgres":
        # ReadyForQuery ends a start that worked, an error one that did not ("is starting up").
        hello = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0"
        return (len(hello) + 4).to_bytes(4, "big") + hello, lambda data: data[:1] == b"E" or b"Z\0\0\0\x05" in data
    whole = lambda data: len(data) >= 7 and len(data) >= 8 + int.from_bytes(data[3:7], "big")
    return b"AMQP\0\0\x09\x01", whole

def greeting(kind, host, port):
    hello, whole = first_words(kind)
    with socket.create_connection((host, port), 2) as s:
        s.settimeout(5)
        s.sendall(hello)
        data = b""
        while not whole(data):
            more = s.recv(65536)
            if not more:
                break
            data += more
    starts = {"nats": b"INFO ", "redis": b"$", "postgres": b"R", "amqp": b"\x01"}
    return data if data.startswith(starts[kind]) else b""

def wait(kind, port, pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            said = greeting(kind, "127.0.0.1", port)
            # It says of itself that it still reads its data.
            if said and b"\r\nloading:1" not in said:
                return 0
        except OSError:
            pass
        try:
            if open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1][0] == "Z":
                return 1
        except OSError:
            return 1
        time.sleep(0.1)
    return 2

def version(kind, url):
    u = urlsplit(url)
    if u.scheme != kind:
        return "version not asked"
    try:
        data = greeting(kind, u.hostname, u.port or PORTS[kind])
    except OSError as e:
        return f"unreachable: {e}"
    if kind == "nats":
        return json.loads(data[5:])["version"] if data else "version unknown"
    if kind == "amqp":
        m = re.search(rb"\x07versionS(....)", data, re.S)
        return data[m.end():m.end() + int.from_bytes(m[1], "big")].decode() if m else "version unknown"
    # Valkey calls itself Redis 7.2 too.
    m = (re.search(rb"valkey_version:(\S+)", data) or re.search(rb"redis_version:(\S+)", data)
         or re.search(rb"server_version\0([^\0 ]+)", data))
    return m[1].decode() if m else "version unknown"

what, *args = sys.argv[1:]
if what == "ports":
    print(*ports(int(args[0])), sep="\n")
elif what == "wait":
    sys.exit(wait(args[0], int(args[1]), int(args[2]), float(args[3])))
else:
    print(version(*args))
EOF
}
