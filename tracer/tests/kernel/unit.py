# What systemd does last before it starts a service, as far as it is about system calls: becomes the rest of the arguments under
# a filter like that of a unit. The first argument says which, as JSON. By libseccomp, as systemd does it, which knows the
# numbers of all names.
import ctypes, errno, json, os, sys

ALLOW, EPERM, EAFNOSUPPORT, ENOSYS = 0x7fff0000, *(0x00050000 | error for error in (
    errno.EPERM, errno.EAFNOSUPPORT, errno.ENOSYS))  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
EQ, GE, MASKED_EQ = 4, 5, 7  # enum scmp_compare
UNKNOWN = -1  # __NR_SCMP_ERROR
FAMILIES = 46  # more than there are


class Condition(ctypes.Structure):
    """`struct scmp_arg_cmp`: of one argument of a call."""
    _fields_ = [('argument', ctypes.c_uint), ('compare', ctypes.c_int), ('a', ctypes.c_uint64), ('b', ctypes.c_uint64)]


seccomp = ctypes.CDLL('libseccomp.so.2')
seccomp.seccomp_init.restype = ctypes.c_void_p
seccomp.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
seccomp.seccomp_rule_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
seccomp.seccomp_load.argtypes = [ctypes.c_void_p]


def checked(what, result):
    if result < 0:
        sys.exit(f'{what}: {os.strerror(-result)}')


def install(default, rules):
    """A filter. Of each rule: a call's name, the answer, and a condition of one argument, or none."""
    program = seccomp.seccomp_init(ctypes.c_uint32(default))
    for name, answer, *conditions in rules:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        # Unknown ones are newer than libseccomp; systemd passes them over, too. Negative ones are of other processors.
        if number != UNKNOWN:
            array = (Condition * len(conditions))(*conditions)
            result = seccomp.seccomp_rule_add_array(program, answer, number, len(conditions), array)
            if result != -errno.EDOM:
                checked(name, result)
    # With no_new_privs, as the unit has it.
    checked('the filter', seccomp.seccomp_load(program))


def flags(argument, bits):
    return Condition(argument, MASKED_EQ, bits, bits)


unit = json.loads(sys.argv[1])
# RestrictAddressFamilies=
denied = [Condition(0, EQ, family, 0) for family in range(FAMILIES) if family not in unit['families']]
install(ALLOW, [('socket', EAFNOSUPPORT, family) for family in denied + [Condition(0, GE, FAMILIES, 0)]])
# RestrictNamespaces=: the flags of clone3 are out of a filter's sight; setns with none is for any.
denied = [(call, EPERM, flags(argument, namespace)) for namespace in unit['denied_namespaces']
          for call, argument in (('clone', 0), ('unshare', 0), ('setns', 1))]
install(ALLOW, denied + [('setns', EPERM, Condition(1, EQ, 0, 0)), ('clone3', ENOSYS)])
# MemoryDenyWriteExecute=
WRITE, EXECUTE, SHM_EXEC = 2, 4, 0o100000
install(ALLOW, [('mmap', EPERM, flags(2, WRITE | EXECUTE)), ('mprotect', EPERM, flags(2, EXECUTE)),
                ('pkey_mprotect', EPERM, flags(2, EXECUTE)), ('shmat', EPERM, flags(2, SHM_EXEC))])
# SystemCallFilter=: last, as it may forbid further ones.
install(EPERM, [(name, ALLOW) for name in unit['allowed']])
os.execv(sys.argv[2], sys.argv[2:])
