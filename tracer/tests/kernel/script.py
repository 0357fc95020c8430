# What the scripts of the kernel tests begin with: talking to the test, sockets, and calls that Python has no name for.
import array, ctypes, mmap, os, select, signal, socket, struct, sys, threading, time

PORT = int(sys.argv[1])
REQUEST = b'GET /path HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n'
RESPONSE = b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok'
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER, SYS_CLONE3 = 425, 426, 427, 435

libc = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(number, *arguments):
    return checked(libc.syscall(ctypes.c_long(number), *(a if a is None or isinstance(a, ctypes._SimpleCData) or
                                isinstance(a, ctypes.Array) else ctypes.c_long(a) for a in arguments)))


def say(*words):
    """One line, from whichever process, in one write."""
    os.write(1, (' '.join(map(str, words)) + '\n').encode())


def hear():
    """Waits for a line of the test, and returns it; without one there is nothing left to do."""
    line = b''
    while not line.endswith(b'\n'):
        byte = os.read(0, 1)
        if not byte:
            os._exit(3)
        line += byte
    return line.decode().strip()


def listen(backlog=64):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(('127.0.0.1', PORT))
    listener.listen(backlog)
    return listener


def connect():
    connection = socket.socket()
    connection.connect(('127.0.0.1', PORT))
    return connection


def read(connection, size=len(REQUEST)):
    """Exactly so much."""
    got = b''
    while len(got) < size:
        piece = connection.recv(size - len(got))
        assert piece, got
        got += piece
    return got


def serve(connection):
    """Reads the request, answers it, and closes."""
    read(connection)
    connection.sendall(RESPONSE)
    connection.close()


def abort(connection):
    """Closes with a RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    connection.close()


def fork(child):
    """Runs `child` in a process that ends with this one; returns its id."""
    pid = os.fork()
    if pid == 0:
        run_child(child)
    return pid


def run_child(child):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        child()
        os._exit(0)
    except BaseException as error:
        os.write(2, f'{error!r}\n'.encode())
        os._exit(1)


def fork_as(pid, child):
    """The same, with a process id of our choice (CLONE_NEWPID is not needed for that, CAP_CHECKPOINT_RESTORE is)."""
    set_tid = (ctypes.c_int * 1)(pid)
    arguments = (ctypes.c_uint64 * 11)()
    arguments[4] = signal.SIGCHLD
    arguments[8], arguments[9] = ctypes.addressof(set_tid), 1
    got = syscall(SYS_CLONE3, arguments, ctypes.sizeof(arguments))
    if got == 0:
        run_child(child)
    assert got == pid, got
    return got


def reap(pid):
    assert os.waitpid(pid, 0)[1] == 0


def rename(name):
    """The name of this thread."""
    checked(libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode() if isinstance(name, str) else name)))


class Ring:
    """An io_uring with one operation on its way at a time."""
    ACCEPT, CLOSE, SEND, RECV = 13, 19, 26, 27
    FIXED_FILE, ASYNC = 1 << 0, 1 << 4
    SQPOLL = 1 << 1
    ENTER_GETEVENTS, ENTER_SQ_WAKEUP = 1 << 0, 1 << 1
    REGISTER_FILES2, REGISTER_SPARSE = 13, 1 << 0

    def __init__(self, flags=0):
        parameters = (ctypes.c_uint32 * 30)()
        parameters[2], parameters[4] = flags, 50
        self.fd = syscall(SYS_IO_URING_SETUP, 4, parameters)
        p = list(parameters)
        (self.sq_head, self.sq_tail, self.sq_mask, _, _, _, self.sq_array) = p[10:17]
        (self.cq_head, self.cq_tail, self.cq_mask, _, _, self.cqes) = p[20:26]
        size = max(self.sq_array + p[0] * 4, self.cqes + p[1] * 16)
        self.rings = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        self.sqes = mmap.mmap(self.fd, p[0] * 64, mmap.MAP_SHARED, offset=0x10000000)
        self.polled = flags & self.SQPOLL

    def word(self, at):
        return struct.unpack_from('I', self.rings, at)[0]

    def run(self, opcode, fd, address=0, length=0, flags=0, file_index=0):
        """Submits one operation, waits for it, and returns its result."""
        tail = self.word(self.sq_tail)
        slot = tail & self.word(self.sq_mask)
        struct.pack_into('=BBHiQQIIQHHiQQ', self.sqes, slot * 64, opcode, flags, 0, fd, 0, address, length, 0, 7, 0, 0,
                         file_index, 0, 0)
        struct.pack_into('I', self.rings, self.sq_array + slot * 4, slot)
        struct.pack_into('I', self.rings, self.sq_tail, tail + 1)
        head = self.word(self.cq_head)
        while self.word(self.cq_tail) == head:
            enter = self.ENTER_GETEVENTS | (self.ENTER_SQ_WAKEUP if self.polled else 0)
            syscall(SYS_IO_URING_ENTER, self.fd, 0 if self.word(self.sq_head) != tail else 1, 1, enter, None, 0)
        slot = head & self.word(self.cq_mask)
        result = struct.unpack_from('=QiI', self.rings, self.cqes + slot * 16)[1]
        struct.pack_into('I', self.rings, self.cq_head, head + 1)
        assert result >= 0, (opcode, os.strerror(-result))
        return result

    def serve(self, listener, flags):
        """Accepts, reads, answers and closes, all through the ring."""
        fd = self.run(self.ACCEPT, listener.fileno(), flags=flags)
        buffer = ctypes.create_string_buffer(4096)
        self.run(self.RECV, fd, ctypes.addressof(buffer), 4096, flags=flags)
        answer = ctypes.create_string_buffer(RESPONSE, len(RESPONSE))
        self.run(self.SEND, fd, ctypes.addressof(answer), len(RESPONSE), flags=flags)
        self.run(self.CLOSE, fd, flags=flags)

    def register_slots(self, count):
        """Room for files that are in the ring alone, without a descriptor."""
        slots = struct.pack('=IIQQQ', count, self.REGISTER_SPARSE, 0, 0, 0)
        syscall(SYS_IO_URING_REGISTER, self.fd, self.REGISTER_FILES2, ctypes.create_string_buffer(slots, 32), 32)

    def close(self):
        self.sqes.close()
        self.rings.close()
        os.close(self.fd)
