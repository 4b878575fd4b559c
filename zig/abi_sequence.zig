//! The part of the ABI about several caches: forks, what they share, and calls for many at once.
//! Exported by abi.zig.
const std = @import("std");
const abi = @import("abi.zig");
const append_file = @import("append.zig");
const attend_many_file = @import("attend_many.zig");
const evict = @import("evict.zig");
const gpa = @import("memory.zig").gpa;
const inspect = @import("inspect.zig");
const message = @import("message.zig");
const status_file = @import("status.zig");
const Cache = abi.Cache;
const Config = @import("config.zig").Config;
const Input = @import("input.zig").Input;
const Status = abi.Status;
const adopt = status_file.adopt;
const choice = @import("config.zig").choice;
const fail = status_file.fail;
const page_bytes = @import("pool.zig").page_bytes;
const Request = @import("request.zig").Request;
const Tier = @import("tier.zig").Tier;

/// Another cache on the same pool, with the first `length` tokens of the stream, and the same pages
/// until one of the two has to change one. All tokens if `length` is 2^64 - 1.
pub fn cache_fork(cache: *Cache, length: u64, out: *?*Cache) callconv(.c) Status {
    out.* = null;
    out.* = cache.fork(length) catch |err| return fail(err);
    return .ok;
}

/// Takes back the tokens from position `length` on.
pub fn cache_cut(cache: *Cache, length: u64) callconv(.c) Status {
    cache.trim_to(length) catch |err| return fail(err);
    return .ok;
}

/// Makes `cache` what `saved` is: a fork that was made of it before.
pub fn cache_restore(cache: *Cache, saved: *Cache) callconv(.c) Status {
    cache.restore(saved) catch |err| return fail(err);
    return .ok;
}

/// Bytes of the pages of this cache that others (forks, open transactions) hold too.
pub fn cache_shared_bytes(cache: *Cache, out: *u64) callconv(.c) Status {
    out.* = inspect.shared_bytes(cache);
    return .ok;
}

/// Evicts neither the tokens in [start, end) that are held nor those that are yet to come.
pub fn cache_pin(cache: *Cache, start: u64, end: u64) callconv(.c) Status {
    evict.pin(cache, .{ .start = start, .end = end }) catch |err| return fail(err);
    return .ok;
}

/// Undoes `cache_pin` for [start, end).
pub fn cache_unpin(cache: *Cache, start: u64, end: u64) callconv(.c) Status {
    evict.unpin(cache, .{ .start = start, .end = end }) catch |err| return fail(err);
    return .ok;
}

/// Evicts all positions of `count` ranges, which are in order, or none.
pub fn cache_evict(cache: *Cache, ranges: [*]const abi.Range, count: u64) callconv(.c) Status {
    const total = length_of(count) catch |err| return fail(err);
    evict.evict(cache, ranges[0..total]) catch |err| return fail(err);
    return .ok;
}

/// The runs of positions that are held: sinks, any number kept behind the window, store, warm,
/// tail; some may be empty. Writes the first `capacity` of them, and how many there are.
pub fn cache_runs(
    cache: *Cache,
    out: ?[*]abi.Range,
    capacity: u64,
    out_count: *u64,
) callconv(.c) Status {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    out_count.* = cache.run_count();
    const target = out orelse return .ok;
    for (0..@intCast(@min(capacity, cache.run_count()))) |i| {
        target[i] = .{ .start = cache.run(i).start, .end = cache.run(i).end };
    }
    return .ok;
}

/// The same for pinned ranges.
pub fn cache_pins(
    cache: *Cache,
    out: ?[*]abi.Range,
    capacity: u64,
    out_count: *u64,
) callconv(.c) Status {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    const pins = evict.pins_of(cache);
    out_count.* = pins.len;
    const target = out orelse return .ok;
    const count: usize = @intCast(@min(capacity, pins.len));
    @memcpy(target[0..count], pins[0..count]);
    return .ok;
}

/// The pages that a cache of this configuration would have.
pub fn cache_layout(config: *const abi.CacheConfig, out: *abi.CacheLayout) callconv(.c) Status {
    const given = adopt(abi.CacheConfig, config) catch |err| return fail(err);
    const checked = Config.check(given) catch |err| return fail(err);
    const sinks, const store, const warm, const tail = checked.tiers();
    return status_file.hand_out(abi.CacheLayout, out, .{
        .sink_page_tokens = sinks.tokens_per_page,
        .sink_page_bytes = pool_bytes(&sinks),
        .store_page_tokens = store.tokens_per_page,
        .store_page_bytes = pool_bytes(&store),
        .tail_page_tokens = tail.tokens_per_page,
        .tail_page_bytes = pool_bytes(&tail),
        .warm_page_tokens = warm.tokens_per_page,
        .warm_page_bytes = pool_bytes(&warm),
    });
}

/// What the pool counts for one page of every head.
fn pool_bytes(tier: *const Tier) u64 {
    // A size that no pool would grant is more than any budget.
    const bytes = page_bytes(tier.page_bytes()) catch return std.math.maxInt(u48);
    return tier.heads * @as(u64, bytes);
}

/// `cache_attend` for `count` items in one go: all of them or none, whose number is then in
/// `out_failed`. A cache may occur more than once.
pub fn attend_many(
    items: [*]const abi.AttendItem,
    count: u64,
    out_failed: *u64,
) callconv(.c) Status {
    out_failed.* = 0;
    const total = length_of(count) catch |err| return fail(err);
    const given = gpa.alloc(attend_many_file.Item, total) catch |err| return fail(err);
    defer gpa.free(given);
    for (given, items, 0..) |*one, *item, i| {
        out_failed.* = i;
        const cache = item.cache orelse return fail(null_argument("cache"));
        cache.verify() catch |err| return fail(err);
        one.* = .{ .cache = cache, .request = request_of(item) catch |err| return fail(err) };
    }
    var failed: usize = 0;
    attend_many_file.attend_many(given, &failed) catch |err| {
        out_failed.* = failed;
        return fail(err);
    };
    return .ok;
}

/// `cache_append` for `count` items in one go: all of them or none, because of the one whose number
/// is then in `out_failed`. No cache may occur twice.
pub fn append_many(
    items: [*]const abi.AppendItem,
    count: u64,
    out_failed: *u64,
) callconv(.c) Status {
    out_failed.* = 0;
    const total = length_of(count) catch |err| return fail(err);
    const given = gpa.alloc(append_file.Item, total) catch |err| return fail(err);
    defer gpa.free(given);
    for (given, items, 0..) |*one, *item, i| {
        out_failed.* = i;
        if (item.size_bytes != @sizeOf(abi.AppendItem)) return fail(error.AbiMismatch);
        const cache = item.cache orelse return fail(null_argument("cache"));
        const keys = item.keys orelse return fail(null_argument("keys"));
        const values = item.values orelse return fail(null_argument("values"));
        const inputs = inputs_of(cache, keys, values, item.layout) catch |err| return fail(err);
        one.* = .{
            .cache = cache,
            .keys = inputs.keys,
            .values = inputs.values,
            .tokens = item.tokens,
        };
    }
    var failed: usize = 0;
    append_file.append_many(given, &failed) catch |err| {
        out_failed.* = failed;
        return fail(err);
    };
    return .ok;
}

const Inputs = struct { keys: Input, values: Input };

/// What an append reads. Without a layout keys and values are f32, contiguous (token, head, dim).
pub fn inputs_of(
    cache: *const Cache,
    keys: *const anyopaque,
    values: *const anyopaque,
    layout: ?*const abi.TokenLayout,
) error{ InvalidArgument, AbiMismatch }!Inputs {
    const config = &cache.config;
    const given = if (layout) |l| try adopt(abi.TokenLayout, l) else abi.TokenLayout{
        .key_token_stride = @as(i64, config.num_kv_heads) * config.head_dim,
        .key_head_stride = config.head_dim,
        .value_token_stride = @as(i64, config.num_kv_heads) * config.value_dim,
        .value_head_stride = config.value_dim,
    };
    return .{
        .keys = .{
            .name = "keys",
            .base = @intFromPtr(keys),
            .dtype = try choice(abi.Dtype, "key_dtype", given.key_dtype),
            .token_stride = given.key_token_stride,
            .head_stride = given.key_head_stride,
            .dim = config.head_dim,
        },
        .values = .{
            .name = "values",
            .base = @intFromPtr(values),
            .dtype = try choice(abi.Dtype, "value_dtype", given.value_dtype),
            .token_stride = given.value_token_stride,
            .head_stride = given.value_head_stride,
            .dim = config.value_dim,
        },
    };
}

pub fn request_of(
    item: *const abi.AttendItem,
) error{ InvalidArgument, AbiMismatch }!Request {
    if (item.size_bytes != @sizeOf(abi.AttendItem)) return error.AbiMismatch;
    const options = if (item.options) |o| try adopt(abi.AttendOptions, o) else abi.AttendOptions{};
    const query = item.query orelse return null_argument("query");
    const out = item.out orelse return null_argument("out");
    return .{
        .query = query,
        .query_tokens = item.query_tokens,
        .query_heads = item.query_heads,
        .scale = item.scale,
        .options = options,
        .mask_kind = if (options.mask == null)
            .none
        else
            try choice(abi.MaskKind, "mask_kind", options.mask_kind),
        .out = out,
    };
}

fn length_of(count: u64) error{OutOfMemory}!usize {
    return std.math.cast(usize, count) orelse error.OutOfMemory;
}

fn null_argument(name: []const u8) error{InvalidArgument} {
    message.set("{s} is null", .{name});
    return error.InvalidArgument;
}
