//! The part of the C ABI that changes the precisions of a cache, and measures what they cost.
//! Exported by abi.zig; calls convert.zig and quality.zig.
const std = @import("std");
const abi = @import("abi.zig");
const convert = @import("convert.zig");
const Cache = @import("cache.zig").Cache;
const Config = @import("config.zig").Config;
const Status = abi.Status;
const quality = @import("quality.zig");
const status_file = @import("status.zig");
const adopt = status_file.adopt;
const fail = status_file.fail;

/// Makes a cache one of another configuration, with all its tokens, or changes nothing. Formats,
/// rotation, `tail_length` and `warm_length` may differ. Every token goes where the rules put it
/// now; where its format stays it keeps its bits, else it is decoded and encoded anew.
pub fn cache_convert(cache: *Cache, config: *const abi.CacheConfig) callconv(.c) Status {
    const given = adopt(abi.CacheConfig, config) catch |err| return fail(err);
    const checked = Config.check(given) catch |err| return fail(err);
    convert.convert(cache, checked) catch |err| return fail(err);
    return .ok;
}

/// How exact the oldest tokens of the tail, up to `tokens_max` and at most 64, are going to be in
/// the store. Writes (kv head, 4): the relative errors of keys, of values and of logits, and the
/// root mean square error of logits; and how many tokens there were. The queries, (query_tokens,
/// query_heads, head_dim), may be null.
pub fn cache_quality(
    cache: *Cache,
    queries: ?[*]const f32,
    query_tokens: u64,
    query_heads: u32,
    scale: f32,
    tokens_max: u64,
    out: [*]f64,
    out_tokens: *u64,
) callconv(.c) Status {
    out_tokens.* = 0;
    const given: ?quality.Queries = if (queries) |rows| .{
        .rows = rows,
        .tokens = std.math.cast(usize, query_tokens) orelse return fail(error.OutOfMemory),
        .heads = query_heads,
        .scale = scale,
    } else null;
    const errors: [*]quality.Errors = @ptrCast(out);
    const heads = cache.config.num_kv_heads;
    out_tokens.* = quality.measure(cache, given, tokens_max, errors[0..heads]) catch |err|
        return fail(err);
    return .ok;
}
