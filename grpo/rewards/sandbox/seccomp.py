"""seccomp: which system calls reward code may make, and with which arguments. For x86_64 and aarch64.

What a call may do to others or beyond what the keeper can count fails with EPERM; calls that do many things are allowed
by a list of what they may do; of a new process and of a signal the keeper is asked. Calls younger than this list fail
as on an older kernel. It closes doors that Landlock leaves open, and does not repeat it.
"""

import ctypes
import errno
import fcntl
import platform
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass

ALLOW, KILL_PROCESS, ERRNO, ASK = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
SECCOMP, SET_FILTER, NEW_LISTENER = (317, 277), 1, 8
RECEIVE, SEND, GO_ON = 0xC0502100, 0xC0182101, 1
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_FROM, AND, RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
FIRST_UNKNOWN = 470  # also above it: X32_BIT, a second way to every system call of x86_64
X32_BIT = 0x40000000

# Numbers on (x86_64, aarch64); 0 there: io_setup on aarch64, else that it lacks the call
DENIED: dict[str, tuple[int, int]] = {
    # other processes and the kernel
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "sync": (162, 81), "syncfs": (306, 267),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vhangup": (153, 58),
    # ports of the run's own servers, which a socket of the same user may share
    "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    # what does the work of others, past this filter, or makes more filters
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_setup": (206, 0),
    "seccomp": SECCOMP, "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "lsm_set_self_attr": (460, 460),
    # mounts, namespaces and files past their path
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262),
    "inotify_init": (253, 26), "inotify_init1": (294, 26),
    # files of this run belong to the same user: Landlock looks at none of these, and before ABI 3 not at truncate
    "chmod": (90, 52), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 55),
    "fchown": (93, 55), "lchown": (94, 55), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "utime": (132, 88),
    "utimes": (235, 88), "futimesat": (261, 88), "utimensat": (280, 88), "truncate": (76, 45),
    # leaving the group that is killed as a whole
    "setsid": (112, 157), "setpgid": (109, 154),
    # memory that nobody counts, or that outlives the process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71),
}  # fmt: skip
# The C library has another way for each: clone3's flags and openat2's are out of a filter's reach
ABSENT: dict[str, tuple[tuple[int, int], int]] = {
    "clone3": ((435, 435), errno.ENOSYS), "openat2": ((437, 437), errno.ENOSYS),
    "fallocate": ((285, 47), errno.EOPNOTSUPP),  # fills a disk faster than anybody can look
}  # fmt: skip
FORK, VFORK, CLONE, KILL, TGKILL = (57, 0), (58, 0), (56, 220), (62, 129), (234, 131)
OPEN, OPENAT, MMAP, PRLIMIT = (2, 0), (257, 56), (9, 222), (302, 261)
AFFINITY, PRIORITY = (203, 122), (141, 140)
PRCTL, FCNTL, IOCTL = (157, 167), (72, 25), (16, 29)
SOCKET, SOCKETPAIR, CONNECT, SETSOCKOPT = (41, 198), (53, 199), (42, 203), (54, 208)

O_TRUNC, O_ACCMODE, WRITING = 0o1000, 3, (1, 2)
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB = 1, 0x20, 0x40000
CLONE_THREAD, CLONE_FILES = 0x10000, 0x400
LEAVING = 0x7E020000 | 0x8000 | 0x2000  # CLONE_NEW*, CLONE_PARENT, CLONE_PTRACE
# Getters; PR_SET_NAME, _TIMERSLACK, _NO_NEW_PRIVS, _THP_DISABLE; arm64's vectors and pointers
PRCTL_MAY = (2, 3, 7, 13, 15, 16, 21, 23, 25, 27, 29, 30, 37, 38, 39, 40, 41, 42, 50, 51, 52, 54, 55, 56, 63, 64)
FCNTL_MAY = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # F_DUPFD … F_SETLKW, F_OFD_*, F_GETPIPE_SZ
IOCTL_MAY = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # terminal or not, FIONREAD, FIONBIO, FIO(N)CLEX
STREAMS = tuple(1 | flags for flags in (0, 0x800, 0x80000, 0x80800))  # a datagram could be sent to any other socket
SOL_SOCKET, SOCKET_MAY = 1, (2, 6, 9, 13, 20, 21, 66, 67)  # REUSEADDR, BROADCAST, KEEPALIVE, LINGER, *TIMEO
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, NETLINK_ROUTE = 1, 2, 10, 16, 0  # the last two for the look-up of names


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that waits for `reply`: a new process or thread, or a signal to `target`, negative for a group."""

    id: int
    signal: bool
    target: int


def restrict(network: bool) -> int | None:
    """Filters the system calls of this process and its children for ever. The file that tells what they ask for.

    None if that is impossible: on another machine, an older kernel, or below a program that listens already. Needs
    no_new_privs.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return None
    architecture, column = ARCHITECTURES[platform.machine()]
    code = program(architecture, column, network)
    instructions = ctypes.create_string_buffer(b"".join(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions)))
    call = SECCOMP[column]
    listener = int(ctypes.CDLL(None, use_errno=True).syscall(call, SET_FILTER, NEW_LISTENER, header))
    return listener if listener >= 0 else None


def asked(listener: int) -> Asked | None:
    """The next call that waits; None if it is gone again."""
    column = ARCHITECTURES[platform.machine()][1]
    with suppress(OSError):
        request = fcntl.ioctl(listener, RECEIVE, bytes(80))
        number = struct.unpack_from("i", request, 16)[0]
        return Asked(
            id=struct.unpack_from("Q", request)[0],
            signal=number in (KILL[column], TGKILL[column]),
            target=struct.unpack_from("i", request, 32)[0],
        )
    return None


def reply(listener: int, call: Asked, error: int) -> None:
    """Lets a call go on if 0, else it fails so; one that is never answered waits until its process is killed."""
    answer = struct.pack("QqiI", call.id, 0, -error, 0 if error else GO_ON)
    with suppress(OSError):  # it may have been killed meanwhile
        fcntl.ioctl(listener, SEND, answer)


def program(architecture: int, column: int, network: bool) -> list[bytes]:
    """The filter as instructions of classic BPF."""
    refuse = _return(ERRNO | errno.EPERM)
    code = [_load(ARCH_AT), _jump(JUMP_EQUAL, architecture, 1, 0), _return(KILL_PROCESS), _load(NUMBER_AT)]
    code += [_jump(JUMP_FROM, FIRST_UNKNOWN, 0, 1), _return(ERRNO | errno.ENOSYS)]
    for numbers in [*DENIED.values(), *(() if network else (CONNECT, SETSOCKOPT))]:
        code += [_jump(JUMP_EQUAL, numbers[column], 0, 1), refuse]
    for numbers, error in ABSENT.values():
        code += [_jump(JUMP_EQUAL, numbers[column], 0, 1), _return(ERRNO | error)]
    for numbers, index, tests in _arguments(network, refuse):
        if numbers[column]:
            body = [_load(ARGUMENTS_AT + 8 * index), *tests, _load(NUMBER_AT)]
            code += [_jump(JUMP_EQUAL, numbers[column], 0, len(body)), *body]
    for numbers in (CLONE, KILL, TGKILL, FORK, VFORK):
        if numbers[column]:
            code += [_jump(JUMP_EQUAL, numbers[column], 0, 1), _return(ASK)]
    return [*code, _return(ALLOW)]


def _arguments(network: bool, refuse: bytes) -> list[tuple[tuple[int, int], int, list[bytes]]]:
    """(Call, which argument, tests of its lower half): whoever passes them goes on behind."""
    may_only: dict[tuple[int, int], list[tuple[int, tuple[int, ...]]]] = {
        PRCTL: [(0, PRCTL_MAY)],
        FCNTL: [(1, FCNTL_MAY)],
        IOCTL: [(1, IOCTL_MAY)],
        SOCKETPAIR: [(0, (AF_UNIX,)), (1, STREAMS)],
        PRLIMIT: [(0, (0,))],
        AFFINITY: [(0, (0,))],
        PRIORITY: [(0, (0,)), (1, (0,))],
        SOCKET: [(0, (AF_INET, AF_INET6, AF_NETLINK) if network else ())],
    }
    tests = [
        (numbers, index, [*_one_of(values), refuse]) for numbers, rows in may_only.items() for index, values in rows
    ]
    # O_TRUNC takes the contents of a file that may only be read
    truncates = [_jump(JUMP_ANY_BIT, O_TRUNC, 0, 4), _operation(AND, O_ACCMODE), *_one_of(WRITING), refuse]
    # what is shared without a file stays in memory, unmapped and uncounted
    maps = [_jump(JUMP_ANY_BIT, MAP_HUGETLB, 2, 0), _jump(JUMP_ANY_BIT, MAP_SHARED, 0, 2)]
    maps += [_jump(JUMP_ANY_BIT, MAP_ANONYMOUS, 0, 1), refuse]
    # a thread with files of its own would hold them unseen
    clones = [_jump(JUMP_ANY_BIT, LEAVING, 2, 0), _jump(JUMP_ANY_BIT, CLONE_THREAD, 0, 2)]
    clones += [_jump(JUMP_ANY_BIT, CLONE_FILES, 1, 0), refuse]
    tests += [(OPEN, 1, truncates), (OPENAT, 2, truncates), (MMAP, 3, maps), (CLONE, 0, clones)]
    if network:
        others = [_load(ARGUMENTS_AT + 16), *_one_of(SOCKET_MAY), refuse]
        tests.append((SETSOCKOPT, 1, [_jump(JUMP_EQUAL, SOL_SOCKET, 0, len(others)), *others]))
        protocol = [_load(ARGUMENTS_AT + 16), *_one_of((NETLINK_ROUTE,)), refuse]
        tests.append((SOCKET, 0, [_jump(JUMP_EQUAL, AF_NETLINK, 0, len(protocol)), *protocol]))
    return tests


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    """Jumps over the next instruction behind the list if the value is in it."""
    return [_jump(JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]


def _load(offset: int) -> bytes:
    return _operation(LOAD, offset)


def _jump(test: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", test, if_true, if_false, value)


def _return(action: int) -> bytes:
    return _operation(RETURN, action)


def _operation(code: int, value: int) -> bytes:
    return struct.pack("HBBI", code, 0, 0, value)
