//! Picks the kernel table at load: the best level that this CPU runs, or the one that was asked
//! for. Called by attend.zig, cache.zig and quantize.zig (`table`) and by abi.zig (`available`,
//! `select`).
const std = @import("std");
const options = @import("options");
const cpu = @import("cpu.zig");
const kernels = @import("kernels.zig");
const Table = kernels.Table;

pub const Level = struct { name: [:0]const u8, table: *const Table, supported: *const fn () bool };

fn linked(comptime name: []const u8) *const Table {
    return @extern(*const Table, .{ .name = "kvz_kernels_" ++ name });
}

fn always() bool {
    return true;
}

/// Levels of this library, best first. `options.levels` is what build.zig linked.
pub const levels: [options.levels.len]Level = blk: {
    var list: [options.levels.len]Level = undefined;
    for (options.levels, &list) |name, *level| level.* = .{
        .name = name ++ "",
        .table = if (options.levels.len == 1) &kernels.table else linked(name),
        .supported = supported_by(name),
    };
    break :blk list;
};

fn supported_by(comptime name: []const u8) *const fn () bool {
    if (std.mem.eql(u8, name, "x86_64_v4")) return cpu.has_x86_64_v4_vnni;
    if (std.mem.eql(u8, name, "x86_64_v3")) return cpu.has_x86_64_v3;
    if (std.mem.eql(u8, name, "neon_dotprod")) return cpu.has_dotprod;
    return always;
}

var chosen: std.atomic.Value(?*const Level) = .init(null);

pub fn current() *const Level {
    if (chosen.load(.acquire)) |level| return level;
    const best = nth_supported(0).?;
    chosen.store(best, .release);
    return best;
}

pub fn table() *const Table {
    return current().table;
}

/// The n-th level that this CPU supports, best first.
pub fn nth_supported(n: usize) ?*const Level {
    var index: usize = 0;
    for (&levels) |*level| {
        if (!level.supported()) continue;
        if (index == n) return level;
        index += 1;
    }
    return null;
}

pub fn select(name: []const u8) error{UnknownIsa}!void {
    var n: usize = 0;
    while (nth_supported(n)) |level| : (n += 1) {
        if (std.mem.eql(u8, level.name, name)) return chosen.store(level, .release);
    }
    return error.UnknownIsa;
}

test "the last level always runs" {
    try std.testing.expect(levels[levels.len - 1].supported());
    try std.testing.expectError(error.UnknownIsa, select("sparc"));
    try select(levels[levels.len - 1].name);
    try std.testing.expectEqualStrings(levels[levels.len - 1].name, current().name);
}
