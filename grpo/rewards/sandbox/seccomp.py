"""seccomp: system calls that reward code has no use for fail with EPERM. For x86_64 and aarch64.

Everything else is allowed: this closes doors that Landlock, limits and the uid leave open, it is not a list of needs.
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from contextlib import suppress

PR_SET_SECCOMP, FILTER_MODE = 22, 2
ALLOW, KILL_PROCESS, ERRNO, ASK = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
SECCOMP, SET_FILTER, NEW_LISTENER = (317, 277), 1, 8
RECEIVE, SEND, GO_ON = 0xC0502100, 0xC0182101, 1
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_ABOVE, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
X32_BIT = 0x40000000  # a second way to every system call of x86_64
NEW_NAMESPACES = 0x7E020000  # the flags CLONE_NEW* of clone
INTERNET = (2, 10, 16)  # AF_INET, AF_INET6, and AF_NETLINK for the look-up of names
PR_SET_PDEATHSIG = 1

# Numbers on (x86_64, aarch64); where aarch64 lacks a call, that of the one that took its place
DENIED: dict[str, tuple[int, int]] = {
    # other processes and the kernel
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "move_pages": (279, 239), "migrate_pages": (256, 238), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vhangup": (153, 58),
    # io_uring does what the others do, past this filter
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # mounts, namespaces and files past their path
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262),
    # leaving the group that is killed as a whole
    "setsid": (112, 157), "setpgid": (109, 154),
    # memory that no limit counts and that outlives the process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
# Rights of files that belong to the same user as this run: Landlock does not look at them
RIGHTS_OF_FILES: dict[str, tuple[int, int]] = {
    "chmod": (90, 52), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 55),
    "fchown": (93, 55), "lchown": (94, 55), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
SIGNALS: dict[str, tuple[int, int]] = {
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
}  # fmt: skip
FORKS = ((57, 220), (58, 220))  # fork and vfork
SOCKET, CLONE, CLONE3, PRLIMIT, PRCTL, KILL, TGKILL = (
    (41, 198), (56, 220), (435, 435), (302, 261), (157, 167), (62, 129), (234, 131),
)  # fmt: skip


def restrict(network: bool, own_files: bool, own_signals: bool) -> tuple[str, ...]:
    """Filters the system calls of this process and its children for ever. Returns ("seccomp",) if that is impossible.

    `own_files`: files of the run belong to the same user, so their rights are protected. `own_signals`: nothing else
    keeps signals from reaching other processes of the same user, so only this process itself can be signalled.
    Needs no_new_privs.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return ("seccomp",)
    architecture, column = ARCHITECTURES[platform.machine()]
    code = program(architecture, column, network, own_files, own_signals)
    buffer, header = _compiled(code)
    result = ctypes.CDLL(None, use_errno=True).prctl(PR_SET_SECCOMP, FILTER_MODE, header, 0, 0)
    del buffer
    return () if result == 0 else ("seccomp",)


def listen() -> int | None:
    """From now on each new process or thread waits for `allow`. The file that tells of them, or None.

    None where the kernel is too old or another program listens already.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return None
    _, column = ARCHITECTURES[platform.machine()]
    code = [_load(NUMBER_AT)]
    for number in {CLONE[column], *(numbers[column] for numbers in FORKS)}:
        code += [_jump(JUMP_EQUAL, number, 0, 1), _return(ASK)]
    buffer, header = _compiled([*code, _return(ALLOW)])
    call = SECCOMP[column]
    listener = int(ctypes.CDLL(None, use_errno=True).syscall(call, SET_FILTER, NEW_LISTENER, header))
    del buffer
    return listener if listener >= 0 else None


def allow(listener: int) -> None:
    """Lets one waiting process go on; one that is never answered waits until it is killed."""
    with suppress(OSError):  # it may have been killed meanwhile
        request = fcntl.ioctl(listener, RECEIVE, bytes(80))
        fcntl.ioctl(listener, SEND, struct.pack("QqiI", struct.unpack_from("Q", request)[0], 0, 0, GO_ON))


def program(architecture: int, column: int, network: bool, own_files: bool, own_signals: bool) -> list[bytes]:
    """The filter as instructions of classic BPF."""
    denied = {**DENIED, **(RIGHTS_OF_FILES if own_files else {}), **(SIGNALS if own_signals else {})}
    refuse = _return(ERRNO | errno.EPERM)
    code = [_load(ARCH_AT), _jump(JUMP_EQUAL, architecture, 1, 0), _return(KILL_PROCESS), _load(NUMBER_AT)]
    code += [_jump(JUMP_ABOVE, X32_BIT, 0, 1), refuse]
    for numbers in denied.values():
        code += [_jump(JUMP_EQUAL, numbers[column], 0, 1), refuse]
    # its flags are out of a filter's reach; the C library then falls back to clone
    code += [_jump(JUMP_EQUAL, CLONE3[column], 0, 1), _return(ERRNO | errno.ENOSYS)]
    code += _argument(CLONE[column], 0, [_jump(JUMP_ANY_BIT, NEW_NAMESPACES, 0, 1), refuse])
    code += _argument(PRLIMIT[column], 0, [_jump(JUMP_EQUAL, 0, 1, 0), refuse])
    code += _argument(PRCTL[column], 0, [_jump(JUMP_EQUAL, PR_SET_PDEATHSIG, 0, 1), refuse])
    allowed = INTERNET if network else ()
    code += _argument(SOCKET[column], 0, [*_one_of(allowed), refuse])
    if own_signals:
        for number in (KILL[column], TGKILL[column]):
            code += _argument(number, 0, [*_one_of((os.getpid(),)), refuse])
    return [*code, _return(ALLOW)]


def _argument(number: int, index: int, tests: list[bytes]) -> list[bytes]:
    """Tests the lower half of an argument of one call; whoever passes them goes on behind."""
    body = [_load(ARGUMENTS_AT + 8 * index), *tests, _load(NUMBER_AT)]
    return [_jump(JUMP_EQUAL, number, 0, len(body)), *body]


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    """Jumps over the next instruction behind the list if the value is in it."""
    return [_jump(JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]


def _compiled(code: list[bytes]) -> tuple[object, object]:
    """(The instructions, which must live on until the call, and the struct sock_fprog that points to them)."""
    buffer = ctypes.create_string_buffer(b"".join(code))
    return buffer, ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", LOAD, 0, 0, offset)


def _jump(test: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", test, if_true, if_false, value)


def _return(action: int) -> bytes:
    return struct.pack("HBBI", RETURN, 0, 0, action)
