//! What the store is going to make of tokens that are still exact: the oldest ones of the tail,
//! packed in working memory as they will be when they migrate, and compared. Called by
//! abi_policy.zig; calls recode.zig.
const std = @import("std");
const format = @import("format.zig");
const message = @import("message.zig");
const recode = @import("recode.zig");
const scratch = @import("scratch.zig");
const vec = @import("vec.zig");
const Cache = @import("cache.zig").Cache;
const Half = format.Half;
const Side = format.Side;
const Tier = @import("tier.zig").Tier;

/// Rows (token, query head, dim) of which query head h reads kv head h / ratio.
pub const Queries = struct { rows: [*]const f32, tokens: usize, heads: usize, scale: f32 };

/// Of one kv head: errors relative to what is exact, by their norms, and the root mean square of
/// the errors of logits. What is the same for all tokens does not count in logits, for softmax
/// does not see it.
pub const Errors = extern struct { key: f64, value: f64, logit: f64, logit_rms: f64 };

/// Measures up to `tokens_max` tokens, at most 64, for each kv head; returns how many.
pub fn measure(
    cache: *Cache,
    queries: ?Queries,
    tokens_max: u64,
    out: []Errors,
) error{ InvalidArgument, OutOfMemory }!u64 {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    const config = &cache.config;
    if (queries) |given| {
        if (given.heads == 0 or given.heads % config.num_kv_heads != 0) {
            message.set("query_heads is {d}; expected a multiple of {d}", .{
                given.heads, config.num_kv_heads,
            });
            return error.InvalidArgument;
        }
    }
    const tail = cache.tier_of(.tail);
    const count: usize = @intCast(@min(tokens_max, format.page_tokens, tail.tokens()));
    const dim = @max(config.head_dim, config.value_dim);
    const dim_max = std.mem.alignForward(usize, dim, format.group);
    const size = format.page_tokens * dim_max;
    const memory = try scratch.acquire(3 * size + dim_max);
    defer scratch.release(memory);
    var work: Work = .{
        .cache = cache,
        .count = count,
        .exact = memory[0..size],
        .packed_rows = memory[size..][0..size],
        .page = @ptrCast(memory[2 * size ..].ptr),
        .query = memory[3 * size ..],
    };
    for (out, 0..) |*errors, head| errors.* = work.measure_head(head, queries);
    return count;
}

/// Sums are double: their order is that of the lanes, on every target.
const wide_lanes = 8;
const Wide = @Vector(wide_lanes, f64);
const none: Wide = @splat(0);

inline fn load(at: [*]const f32) Wide {
    return @floatCast(vec.load(@Vector(wide_lanes, f32), at));
}

inline fn add(sums: Wide) f64 {
    const s: [wide_lanes]f64 = sums;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

const Work = struct {
    cache: *Cache,
    count: usize,
    /// (token, dim)
    exact: []f32,
    packed_rows: []f32,
    page: [*]u8,
    /// A query, padded.
    query: []f32,

    fn measure_head(work: *Work, head: usize, queries: ?Queries) Errors {
        const value_dim = work.cache.config.value_dim;
        work.pass(.value, head);
        const value = relative(work.sums(value_dim));
        const key_dim = work.cache.config.head_dim;
        work.pass(.key, head);
        var errors: Errors = .{
            .key = relative(work.sums(key_dim)),
            .value = value,
            .logit = 0,
            .logit_rms = 0,
        };
        const given = queries orelse return errors;
        var total: Sums = .{};
        const ratio = given.heads / work.cache.config.num_kv_heads;
        for (0..given.tokens) |token| for (0..ratio) |i| {
            const row = token * given.heads + head * ratio + i;
            const sum = work.logit_sums(given.rows[row * key_dim ..][0..key_dim], given.scale);
            total.exact += sum.exact;
            total.wrong += sum.wrong;
        };
        errors.logit = relative(total);
        const logits: f64 = @floatFromInt(@max(given.tokens * ratio * work.count, 1));
        errors.logit_rms = @sqrt(total.wrong / logits);
        return errors;
    }

    /// Reads the rows of one side, and makes them what the store will hold.
    fn pass(work: *Work, comptime side: Side, head: usize) void {
        const cache = work.cache;
        const tail = cache.tier_of(.tail);
        const plain = tail.half(side);
        const dim = plain.dim_stored();
        for (0..work.count) |i| {
            const position = tail.start + i;
            const base = tail.half_at(side, position / tail.tokens_per_page, head);
            const slot: usize = @intCast(position % tail.tokens_per_page);
            recode.decode(plain, side, base, slot, 1, work.exact[i * dim ..].ptr);
        }
        const rows = work.packed_rows;
        @memcpy(rows[0 .. work.count * dim], work.exact[0 .. work.count * dim]);
        var held = plain;
        if (cache.config.has_warm()) held = work.through(side, held, cache.tier_of(.warm));
        const store = cache.tier_of(.store);
        if (!std.meta.eql(held, store.half(side))) held = work.through(side, held, store);
        recode.change_space(held, plain, work.count, rows.ptr);
    }

    fn through(work: *Work, comptime side: Side, from: Half, tier: *const Tier) Half {
        const to = tier.half(side);
        const rows = work.packed_rows.ptr;
        recode.change_space(from, to, work.count, rows);
        recode.set_offsets(to, work.page, work.count, rows);
        recode.encode(to, side, work.page, 0, work.count, rows);
        recode.decode(to, side, work.page, 0, work.count, rows);
        return to;
    }

    /// Squares of what is exact, and of what is wrong.
    const Sums = struct { exact: f64 = 0, wrong: f64 = 0 };

    fn sums(work: *const Work, dim: usize) Sums {
        const stride = std.mem.alignForward(usize, dim, vec.lanes);
        var exact = none;
        var wrong = none;
        var i: usize = 0; // rows are padded with zeros
        while (i < work.count * stride) : (i += wide_lanes) {
            const x = load(work.exact.ptr + i);
            const off = load(work.packed_rows.ptr + i) - x;
            exact += x * x;
            wrong += off * off;
        }
        return .{ .exact = add(exact), .wrong = add(wrong) };
    }

    /// The same for the logits of a query, less their means.
    fn logit_sums(work: *const Work, query: []const f32, scale: f32) Sums {
        const stride = std.mem.alignForward(usize, query.len, vec.lanes);
        const padded = work.query[0..stride];
        @memcpy(padded[0..query.len], query);
        @memset(padded[query.len..], 0);
        var total: Sums = .{};
        var means: [2]f64 = .{ 0, 0 };
        for (0..work.count) |token| {
            var logits = none;
            var errors = none;
            var i: usize = 0;
            while (i < stride) : (i += wide_lanes) {
                const q = load(padded.ptr + i);
                const x = load(work.exact.ptr + token * stride + i);
                logits += q * x;
                errors += q * (load(work.packed_rows.ptr + token * stride + i) - x);
            }
            const logit = add(logits) * scale;
            const wrong = add(errors) * scale;
            means[0] += logit;
            means[1] += wrong;
            total.exact += logit * logit;
            total.wrong += wrong * wrong;
        }
        const n: f64 = @floatFromInt(@max(work.count, 1));
        total.exact = @max(total.exact - means[0] * means[0] / n, 0);
        total.wrong = @max(total.wrong - means[1] * means[1] / n, 0);
        return total;
    }

    fn relative(total: Sums) f64 {
        return if (total.exact > 0) @sqrt(total.wrong / total.exact) else 0;
    }
};
