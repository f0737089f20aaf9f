"""Requests that make no sense, sent with libnbd: each gets its error, and the connection goes on."""

import errno
import sys

import nbd

SIZE = 256 << 20


def connect(**settings):
    handle = nbd.NBD()
    for name, value in settings.items():
        getattr(handle, "set_" + name)(value)
    # Else libnbd would refuse them itself.
    handle.set_strict_mode(0)
    handle.set_export_name("disk")
    handle.connect_unix(sys.argv[1])
    return handle


def refused(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == expected, (call, arguments, error.errno)
        return
    raise AssertionError(f"{call} {arguments} was not refused")


def exercise(handle):
    assert handle.get_size() == SIZE
    refused(errno.EINVAL, handle.pread, 4096, SIZE)
    refused(errno.EINVAL, handle.pread, 4097, SIZE - 4096)
    refused(errno.ENOSPC, handle.pwrite, b"x" * 4096, SIZE - 512)
    refused(errno.ENOSPC, handle.zero, 1 << 20, SIZE - 4096)
    refused(errno.EINVAL, handle.trim, 4096, SIZE)
    refused(errno.EINVAL, handle.pwrite, b"x", 0, 1 << 9)
    refused(errno.EINVAL, handle.flush, 1 << 3)
    handle.pwrite(b"y" * 1000, 77)
    assert handle.pread(1200, 0) == bytes(77) + b"y" * 1000 + bytes(123)
    handle.zero(500, 100, nbd.CMD_FLAG_NO_HOLE)
    assert handle.pread(1200, 0) == bytes(77) + b"y" * 23 + bytes(500) + b"y" * 477 + bytes(123)
    handle.trim(8192, 0)
    assert handle.pread(8192, 0) == bytes(8192)
    data = bytes(range(256)) * 4096 * 32
    handle.pwrite(data, 4099)
    assert handle.pread(len(data) - 1, 4099) == data[:-1]
    handle.trim(len(data) + 8192, 0)
    handle.cache(SIZE, 0)
    handle.flush()


# With structured replies and without.
exercise(connect())
plain = connect(request_structured_replies=False)
assert not plain.get_structured_replies_negotiated()
exercise(plain)
refused(errno.EINVAL, plain.pread, 4096, 0, nbd.CMD_FLAG_DF)

# In one piece, whatever the size.
handle = connect()
handle.pwrite(b"z" * (1 << 20), 1)
assert handle.pread(1 << 20, 1, nbd.CMD_FLAG_DF) == b"z" * (1 << 20)

# An export that is not there: libnbd says so, and another negotiation on the same socket works.
handle = nbd.NBD()
handle.set_export_name("nowhere")
refused(errno.ENOENT, handle.connect_unix, sys.argv[1])

# Contexts that are not there are left out, and extents need the one that is.
handle = nbd.NBD()
handle.set_export_name("disk")
handle.add_meta_context("qemu:dirty-bitmap:x")
handle.add_meta_context("base:allocation")
handle.connect_unix(sys.argv[1])
assert handle.can_meta_context("base:allocation")
assert not handle.can_meta_context("qemu:dirty-bitmap:x")
extents = []
handle.block_status(SIZE, 0, lambda _, offset, found, error: extents.extend(found))
assert sum(extents[::2]) <= SIZE and extents[1] == 0, extents
extents.clear()
status = lambda _, offset, found, error: extents.extend(found)
handle.block_status(1 << 20, 512, status, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2, extents

# Many at a time, more than the socket holds, answered whole.
handle = connect()
buffers = [nbd.Buffer(256 << 10) for _ in range(200)]
cookies = [handle.aio_pread(buffer, at << 18) for at, buffer in enumerate(buffers)]
while handle.aio_in_flight():
    handle.poll(-1)
assert all(handle.aio_command_completed(cookie) for cookie in cookies)
handle.shutdown()
