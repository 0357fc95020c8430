#!/bin/bash
# The guest's part: what was sent with it runs, and what it says goes out of the second serial line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t securityfs security /sys/kernel/security
mkdir -p /lib/modules
mount --bind /payload/modules /lib/modules
hostname guest
# Some tests open very many.
ulimit -n 65536
ip link set lo up
# What is asked of these by number, not by name, no kernel loads by itself.
for module in inet_diag tcp_diag tun veth nf_tables; do
    modprobe "$module"
done
stty -F /dev/ttyS1 raw -echo
# shellcheck source=/dev/null
. /payload/settings
mkdir -p "$(dirname "$TRACER")"
ln -s /payload/tracer "$TRACER"

say() { echo "@$*" >/dev/ttyS1; }

say kernel "$(uname -r)"
for arguments in '' '--pid 1 --port 1 --states --full-target'; do
    # shellcheck disable=SC2086
    RUST_LOG=tracer::kernel=debug "$TRACER" run --demo --duration 4s $arguments >/tmp/demo 2>/tmp/log
    code=$?
    cat /tmp/log >&2
    grep '^tracer: ' /tmp/log >/dev/ttyS1
    say load "$code" "$(grep -c 'client asked: Connection: close' /tmp/demo)"
    ((code == 0)) || break
done
if ((code == 0)) && [[ -n "${TESTS+set}${MACHINE_TESTS+set}" ]]; then
    cd /tmp || exit
    export TRACER_TEST_PATIENCE=240 TRACER_TEST_GO=/payload/go TRACER_TEST_SKIPPED=/tmp/skipped TRACER_TEST_GUEST=1
    # As long as each hook has two programs, no test's start or end makes the kernel patch its code: an emulated processor does not
    # always notice, and hangs or crashes the kernel. A start on a kernel without any was seen above.
    sleep infinity &
    nobody=$!
    for keeper in 1 2; do
        "$TRACER" run --summary-only --port 1 --pid $nobody >/tmp/keeper.$keeper 2>&1 &
        until [[ -s /tmp/keeper.$keeper ]]; do sleep 0.1; done
    done
    if [[ -n "${TESTS+set}" ]]; then
        # shellcheck disable=SC2086
        /payload/kernel-tests --test-threads=2 --exact $TESTS >/dev/ttyS1
        say tests $?
    fi
    if [[ -n "${MACHINE_TESTS+set}" ]]; then
        # shellcheck disable=SC2086
        /payload/kernel-tests --test-threads=1 --nocapture --ignored --exact $MACHINE_TESTS >/dev/ttyS1
        say tests $?
    fi
    # Not while they run: it would get into the middle of their lines.
    [[ ! -e /tmp/skipped ]] || sort -u /tmp/skipped >/dev/ttyS1
fi
# It is ended from outside: one that has slept does not always find its own switch.
say end
sleep 60
