# shellcheck shell=bash
# What the test bed's scripts share: daemons that are started detached, remembered by pid and start
# time, and ended by exactly those, never by a name.

# The directory of a running bed holds `pid/<name>`: "<pid> <start time in clock ticks since boot>".

say() { printf '%s: %s\n' "${0#"$PWD/"}" "$*" >&2; }
die() { say "$*"; exit 1; }

# start_time PID: field 22 of /proc/PID/stat, which tells a process from a later one of the same pid.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # The second field is the program's name in parentheses and may hold blanks.
    # shellcheck disable=SC2086 # split on purpose
    set -- ${stat##*) }
    # A zombie is no longer running, whoever has yet to reap it.
    [ "$1" != Z ] || return 1
    echo "${20}"
}

# free_port: a loopback port that nothing listens on and that this run has not handed out. Below the
# range from which the kernel takes the ports of outgoing connections (32768 and up).
handed_out=" "
free_port() {
    local try
    for try in {1..200}; do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        case $handed_out in *" $port "*) continue ;; esac
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            handed_out+="$port "
            return 0
        fi
    done
    die "no free port after $try tries"
}

# make_bed DIR: an empty directory of ours; what an earlier run left in it is ended and removed.
make_bed() {
    local dir=$1
    if [ -e "$dir/.jiriaf-test-bed" ]; then
        stop_all "$dir"
        rm -rf "$dir"
    elif [ -d "$dir" ] && [ -n "$(ls -A "$dir")" ]; then
        die "$dir is neither empty nor an earlier test bed: name another directory"
    fi
    mkdir -p "$dir/pid" "$dir/log"
    : >"$dir/.jiriaf-test-bed"
}

# start DIR NAME COMMAND…: runs COMMAND in a session of its own, its output in DIR/log/NAME.log.
# Descriptor 9 is where tests/run keeps its lock: a daemon must not hold on to it.
start() {
    local dir=$1 name=$2 pid
    shift 2
    setsid "$@" >>"$dir/log/$name.log" 2>&1 </dev/null 9>&- &
    pid=$!
    disown "$pid"
    # The start time is taken after exec or before, it does not change with it.
    echo "$pid $(start_time "$pid")" >"$dir/pid/$name"
}

# running DIR NAME: whether the process that was started under this name is still there.
running() {
    local pid ticks
    [ -f "$1/pid/$2" ] || return 1
    read -r pid ticks <"$1/pid/$2" || return 1
    [ -n "$ticks" ] && [ "$(start_time "$pid")" = "$ticks" ]
}

# stop DIR NAME: SIGTERM, ten seconds, SIGKILL.
stop() {
    local dir=$1 name=$2 pid ticks i
    [ -f "$dir/pid/$name" ] || return 0
    read -r pid ticks <"$dir/pid/$name" || true
    if running "$dir" "$name"; then kill -TERM "$pid" 2>/dev/null; fi
    for ((i = 0; i < 100; i++)); do
        running "$dir" "$name" || break
        sleep 0.1
    done
    if running "$dir" "$name"; then
        say "$name (pid $pid) did not end within 10 s of SIGTERM: SIGKILL"
        kill -KILL "$pid" 2>/dev/null
    fi
    rm -f "$dir/pid/$name"
}

stop_all() {
    local dir=$1 file
    # The youngest first: what was started last leans on what was started before.
    while IFS= read -r file; do
        [ -z "$file" ] || stop "$dir" "${file##*/}"
    done < <(find "$dir/pid" -type f -printf '%T@ %p\n' 2>/dev/null | sort -rn | cut -d' ' -f2-)
}

# wait_until SECONDS WHAT COMMAND…: until COMMAND succeeds.
wait_until() {
    local limit=$1 what=$2 end
    shift 2
    end=$((SECONDS + limit))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || { say "$what: not within $limit s"; return 1; }
        sleep 0.2
    done
}
