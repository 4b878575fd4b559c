//! The message of this thread's latest failure. Written where the facts are known (`set`), or by
//! abi.zig from the error alone; read by hosts through `kvz_last_error`.
const std = @import("std");

threadlocal var buffer: [512:0]u8 = @splat(0);
threadlocal var pending: bool = false;

/// Says what went wrong, before the error is returned. Cut to one line of at most 511 bytes.
pub fn set(comptime text: []const u8, args: anytype) void {
    const written = std.fmt.bufPrint(
        buffer[0 .. buffer.len - 1],
        text,
        args,
    ) catch buffer[0 .. buffer.len - 1];
    buffer[written.len] = 0;
    pending = true;
}

/// Keeps what `set` said since the last failure, else takes `text`.
pub fn settle(text: []const u8) void {
    if (!pending) set("{s}", .{text});
    pending = false;
}

pub fn last() [*:0]const u8 {
    return &buffer;
}

test "details win over the general text, once" {
    set("token {d} is {d}", .{ 3, 0.5 });
    settle("bad input");
    try std.testing.expectEqualStrings("token 3 is 0.5", std.mem.span(last()));
    settle("bad input");
    try std.testing.expectEqualStrings("bad input", std.mem.span(last()));
}
