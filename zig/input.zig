//! Reads the caller's keys or values where they lie: any of four element types, any token and head
//! strides. Called by cache.zig.
const std = @import("std");
const abi = @import("abi.zig");
const format = @import("format.zig");
const message = @import("message.zig");
const rotate = @import("rotate.zig");
const vec = @import("vec.zig");
const Half = format.Half;

pub const Refusal = error{ NotFinite, NotRepresentable };

pub const Input = struct {
    /// "keys" or "values", for messages.
    name: []const u8,
    base: usize,
    dtype: abi.Dtype,
    /// In elements.
    token_stride: i64,
    head_stride: i64,
    dim: usize,

    fn address(in: *const Input, token: u64, head: usize) usize {
        const size: i64 = switch (in.dtype) {
            .f32 => 4,
            .f16, .bf16 => 2,
            .f64 => 8,
        };
        const elements = @as(i64, @intCast(token)) *% in.token_stride +%
            @as(i64, @intCast(head)) *% in.head_stride;
        return in.base +% @as(usize, @truncate(@as(u64, @bitCast(elements *% size))));
    }

    /// The row of (token, head) as f32 into `row[0..dim]`.
    pub fn read(in: *const Input, token: u64, head: usize, row: []f32) void {
        const at = in.address(token, head);
        switch (in.dtype) {
            inline else => |tag| {
                const source: [*]align(1) const Element(tag) = @ptrFromInt(at);
                for (row[0..in.dim], 0..) |*x, i| x.* = convert(tag, source[i]);
            },
        }
    }

    fn Element(comptime dtype: abi.Dtype) type {
        return switch (dtype) {
            .f32 => f32,
            .f16 => f16,
            .bf16 => u16,
            .f64 => f64,
        };
    }

    inline fn convert(comptime dtype: abi.Dtype, x: Element(dtype)) f32 {
        return switch (dtype) {
            .f32 => x,
            .f16 => vec.from_f16(1, .{x})[0],
            .bf16 => vec.from_bf16(1, .{x})[0],
            .f64 => @floatCast(x),
        };
    }

    /// Refuses what the cache could not give back: NaN, infinities, magnitudes above `limit`.
    pub fn validate(in: *const Input, tokens: u64, heads: usize, limit: f32) Refusal!void {
        for (0..@intCast(tokens)) |token| for (0..heads) |head| {
            switch (in.dtype) {
                inline else => |tag| {
                    const at = in.address(token, head);
                    const source: [*]align(1) const Element(tag) = @ptrFromInt(at);
                    var refused = false;
                    for (0..in.dim) |i| {
                        // Written so that NaN is refused too.
                        refused = refused or !(@abs(convert(tag, source[i])) <= limit);
                    }
                    if (refused) return in.explain(tag, source, token, head, limit);
                },
            }
        };
    }

    fn explain(
        in: *const Input,
        comptime dtype: abi.Dtype,
        source: [*]align(1) const Element(dtype),
        token: u64,
        head: usize,
        limit: f32,
    ) Refusal {
        for (0..in.dim) |i| {
            const x = convert(dtype, source[i]);
            if (@abs(x) <= limit) continue;
            const given = if (dtype == .f64) source[i] else x;
            const where = "{s}: token {d}, head {d}, dim {d} is {d}; ";
            if (!std.math.isFinite(given)) {
                const text = where ++ "expected finite values";
                message.set(text, .{ in.name, token, head, i, given });
                return error.NotFinite;
            }
            const text = where ++ "the largest magnitude that this cache's precisions hold is {d}";
            message.set(text, .{ in.name, token, head, i, given, limit });
            return error.NotRepresentable;
        }
        unreachable;
    }
};

/// The largest magnitude that `half` can hold, whatever the other values of the row are.
pub fn limit_of(half: Half) f32 {
    const largest_f16 = 65504.0;
    const largest = switch (half.format) {
        .f32 => std.math.floatMax(f32),
        // just below 65520, which rounds to infinity
        .f16 => return @as(f32, @bitCast(@as(u32, 0x477f_efff))),
        .bf16 => return @as(f32, @bitCast(@as(u32, 0x7f7f_7fff))),
        .q8 => largest_f16 * 127.0,
        .q4 => largest_f16 * 8.0,
    };
    if (!half.rotated) return largest;
    // A rotated value is at most sqrt(n) times the largest of its block.
    const block: f64 = @floatFromInt(rotate.largest_block(half.dim_stored()));
    return @floatCast(largest / @sqrt(block));
}

test "limits round to the largest finite value" {
    const half: Half = .{ .format = .f16, .dim = 64, .slots = 16, .rotated = false };
    const limit = limit_of(half);
    try std.testing.expect(std.math.isFinite(vec.to_f16(1, .{limit})[0]));
    const above = std.math.nextAfter(f32, limit, 1e9);
    try std.testing.expect(!std.math.isFinite(vec.to_f16(1, .{above})[0]));
    const q4: Half = .{ .format = .q4, .dim = 128, .slots = 64, .rotated = true };
    try std.testing.expectApproxEqRel(@as(f32, 46318.3), limit_of(q4), 1e-5);
}
