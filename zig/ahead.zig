//! Software prefetch, spread evenly over a kernel's work. While one page is computed, the next one
//! is on its way from memory; asked for in bursts it would wait in the processor's few line-fill
//! buffers. It comes into the second-level cache: two pages do not fit the first.
//! Used by score.zig, accumulate.zig and tile.zig (window.zig says what to fetch) and by rows.zig.
const builtin = @import("builtin");

pub const line_bytes = 64;

/// Cache lines that a kernel call should ask for, to read or to write them. All are memory that can
/// be read.
pub const Ahead = extern struct {
    at: [*]const u8,
    lines: usize,

    pub const none: Ahead = .{ .at = undefined, .lines = 0 };

    pub fn of(bytes: []const u8) Ahead {
        return .{ .at = bytes.ptr, .lines = bytes.len / line_bytes };
    }

    /// Share `first` of `shares`, and as many after it.
    pub fn part(ahead: *const Ahead, first: usize, count: usize, shares: usize) Ahead {
        const start = ahead.lines * first / shares;
        const end = ahead.lines * (first + count) / shares;
        return .{ .at = ahead.at + start * line_bytes, .lines = end - start };
    }

    /// To be advanced `turns` times.
    pub inline fn over(ahead: *const Ahead, turns: usize) Spread {
        return .{ .at = ahead.at, .lines = ahead.lines, .turns = turns, .credit = 0 };
    }
};

pub const Spread = struct {
    at: [*]const u8,
    lines: usize,
    turns: usize,
    credit: usize,

    pub inline fn turn(spread: *Spread) void {
        spread.credit += spread.lines;
        while (spread.credit >= spread.turns) {
            fetch(spread.at);
            spread.at += line_bytes;
            spread.credit -= spread.turns;
        }
    }
};

/// All lines of a row, into the nearest cache.
pub fn fetch_row(row: []const f32) void {
    var i: usize = 0;
    while (i < row.len) : (i += line_bytes / @sizeOf(f32)) @prefetch(row.ptr + i, .{});
}

inline fn fetch(line: [*]const u8) void {
    // WebAssembly has no prefetch. Nothing waits for a load whose result is not used, until the
    // processor's window is full; and as lines follow each other, its own prefetchers run ahead.
    if (builtin.cpu.arch.isWasm()) {
        const byte: *const volatile u8 = @ptrCast(line);
        _ = byte.*;
    } else @prefetch(line, .{ .locality = 2, .cache = .data });
}
