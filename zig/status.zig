//! How failures and versioned structs cross the ABI. Called by abi.zig.
const std = @import("std");
const message = @import("message.zig");
const Status = @import("abi.zig").Status;

pub const Error = error{
    OutOfMemory,
    PoolExhausted,
    InvalidArgument,
    NotFinite,
    NotRepresentable,
    AbiMismatch,
    ForeignBuffer,
    Corrupt,
    Damaged,
    UnknownIsa,
};

/// The one place where an error becomes a code, and a sentence where none was said. The switch is
/// exhaustive, so a new error does not compile until it is mapped.
pub fn fail(err: Error) Status {
    const status: Status, const text: []const u8 = switch (err) {
        error.OutOfMemory => .{ .out_of_memory, "the system has no memory left for this" },
        error.PoolExhausted => .{
            .pool_exhausted,
            "the pool's byte limit leaves no room for this",
        },
        error.InvalidArgument => .{ .invalid_argument, "an argument is out of range" },
        error.NotFinite => .{ .not_finite, "a value is NaN or infinite" },
        error.NotRepresentable => .{ .not_representable, "a value is too large for its precision" },
        error.AbiMismatch => .{
            .abi_mismatch,
            "a struct's size_bytes is not one that this library knows",
        },
        error.ForeignBuffer => .{
            .foreign_buffer,
            "the buffer is not one that this pool has handed out",
        },
        error.Corrupt => .{ .corrupt, "an invariant does not hold" },
        error.Damaged => .{ .damaged, "the file is damaged" },
        error.UnknownIsa => .{
            .invalid_argument,
            "no such ISA in this library, or not on this CPU",
        },
    };
    message.settle(text);
    return status;
}

/// The caller's (maybe older, shorter) struct over this build's defaults.
pub fn adopt(comptime T: type, given: *const T) error{AbiMismatch}!T {
    var full: T = .{};
    if (given.size_bytes > @sizeOf(T) or given.size_bytes < @sizeOf(u32)) return error.AbiMismatch;
    const source: [*]const u8 = @ptrCast(given);
    @memcpy(std.mem.asBytes(&full)[0..given.size_bytes], source[0..given.size_bytes]);
    full.size_bytes = @sizeOf(T);
    return full;
}

/// As much of `value` as the caller's `out.size_bytes` has room for.
pub fn hand_out(comptime T: type, out: *T, value: T) Status {
    const size = out.size_bytes;
    if (size < @sizeOf(u32)) return fail(error.AbiMismatch);
    const target: [*]u8 = @ptrCast(out);
    const known = @min(size, @sizeOf(T));
    @memcpy(target[0..known], std.mem.asBytes(&value)[0..known]);
    out.size_bytes = known;
    return .ok;
}
