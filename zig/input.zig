//! Reads the caller's keys or values where they lie: any of four element types, any token and head
//! strides. Called by cache.zig.
const std = @import("std");
const abi = @import("abi.zig");
const dispatch = @import("dispatch.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const message = @import("message.zig");
const rotate = @import("rotate.zig");
const rows_file = @import("rows.zig");
const threads = @import("threads.zig");
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

    fn element_bytes(in: *const Input) i64 {
        return switch (in.dtype) {
            .f32 => 4,
            .f16, .bf16 => 2,
            .f64 => 8,
        };
    }

    fn address(in: *const Input, token: u64, head: usize) usize {
        const elements = @as(i64, @intCast(token)) *% in.token_stride +%
            @as(i64, @intCast(head)) *% in.head_stride;
        const distance: u64 = @bitCast(elements *% in.element_bytes());
        return in.base +% @as(usize, @truncate(distance));
    }

    /// The same without the first `tokens` tokens.
    pub fn from(in: *const Input, tokens: u64) Input {
        var rest = in.*;
        rest.base = in.address(tokens, 0);
        return rest;
    }

    /// The rows of `count` tokens of one head.
    pub fn rows(in: *const Input, token: u64, head: usize, count: usize) rows_file.Rows {
        return in.rows_at(in.address(token, head), in.token_stride, count);
    }

    fn rows_at(in: *const Input, at: usize, stride: i64, count: usize) rows_file.Rows {
        return .{
            .first = at,
            .stride_bytes = @truncate(stride *% in.element_bytes()),
            .dtype = @backingInt(in.dtype),
            .count = count,
            .dim = in.dim,
        };
    }

    /// Refuses what the cache could not give back: NaN, infinities, magnitudes above `limit`.
    pub fn validate(in: *const Input, tokens: u64, heads: usize, limit: f32) Refusal!void {
        const refused = in.first_refused(tokens, heads, limit) orelse return;
        for (0..heads) |head| switch (in.dtype) {
            inline else => |tag| try in.explain(tag, refused, head, limit),
        };
        unreachable; // one of the rows was refused
    }

    /// Whether `validate` accepts a token.
    pub fn accepts(in: *const Input, token: u64, heads: usize, limit: f32) bool {
        const rows_of = in.rows_at(in.address(token, 0), in.head_stride, heads);
        return dispatch.table().check(&.{ .rows = rows_of, .limit = limit });
    }

    fn first_refused(in: *const Input, tokens: u64, heads: usize, limit: f32) ?u64 {
        const shared = tokens *| heads *| in.dim >= threads.parallel_values_min;
        const workers = if (shared) threads.thread_count() else 1;
        var validation: Validation = .{
            .input = in,
            .heads = heads,
            .limit = limit,
            .parts = .of(@intCast(tokens), workers),
        };
        threads.run(validation.parts.count(), &validation, Validation.run_part);
        const refused = validation.refused.load(.monotonic);
        return if (refused == none) null else refused;
    }

    const none = std.math.maxInt(usize);

    /// Looks for the first token that is refused, some tokens at a time.
    const Validation = struct {
        input: *const Input,
        heads: usize,
        limit: f32,
        parts: threads.Parts,
        refused: std.atomic.Value(usize) = .init(none),

        fn run_part(context: *anyopaque, part: u32) void {
            const self: *Validation = @ptrCast(@alignCast(context));
            const first, const end = self.parts.part(part);
            for (first..end) |token| {
                if (self.input.accepts(token, self.heads, self.limit)) continue;
                _ = self.refused.fetchMin(token, .monotonic);
                return;
            }
        }
    };

    fn explain(
        in: *const Input,
        comptime dtype: abi.Dtype,
        token: u64,
        head: usize,
        limit: f32,
    ) Refusal!void {
        const at = in.address(token, head);
        const source: [*]align(1) const rows_file.Element(dtype) = @ptrFromInt(at);
        for (0..in.dim) |i| {
            const given = switch (dtype) {
                .f32, .f64 => source[i],
                .f16 => vec.from_f16(1, .{source[i]})[0],
                .bf16 => vec.from_bf16(1, .{source[i]})[0],
            };
            if (@abs(@as(f32, @floatCast(given))) <= limit) continue;
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
        inline .q2k, .q3k, .q4k, .q5k, .q6k => |tag| k_format.limit(
            format.all[@backingInt(tag)].bits,
        ),
    };
    if (!half.rotated) return largest;
    // A rotated value is at most sqrt(n) times the largest of its block.
    const block: f64 = @floatFromInt(rotate.largest_block(half.dim_stored()));
    return @floatCast(largest / @sqrt(block));
}

/// The largest magnitude of what `warm` holds before `store` does. Rounding may have made values
/// larger by then: by little, within a space of values; by up to half a step of every value of its
/// block, where they are rotated in between.
pub fn limit_through(warm: Half, store: Half) f32 {
    const block: f64 = @floatFromInt(rotate.largest_block(warm.dim_stored()));
    const unrotates = warm.rotated and !store.rotated;
    const growth: f64 = if (unrotates) 1.0 + block / 16.0 else 1.0 + 1.0 / 128.0;
    return @floatCast(limit_of(store) / growth);
}

test "limits round to the largest finite value" {
    const half: Half = .{ .format = .f16, .dim = 64, .slots = 16, .rotated = false };
    const limit = limit_of(half);
    try std.testing.expect(std.math.isFinite(vec.from_f16(1, vec.to_f16(1, .{limit}))[0]));
    const above = std.math.nextAfter(f32, limit, 1e9);
    try std.testing.expect(!std.math.isFinite(vec.from_f16(1, vec.to_f16(1, .{above}))[0]));
    const q4: Half = .{ .format = .q4, .dim = 128, .slots = 64, .rotated = true };
    try std.testing.expectApproxEqRel(@as(f32, 46318.3), limit_of(q4), 1e-5);
}
