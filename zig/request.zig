//! What is asked of attention, and whether it can be answered. Called by attend.zig and
//! attend_many.zig.
const std = @import("std");
const abi = @import("abi.zig");
const dispatch = @import("dispatch.zig");
const message = @import("message.zig");
const Cache = @import("cache.zig").Cache;

pub const Request = struct {
    query: [*]const f32, // (query_tokens, query_heads, head_dim)
    query_tokens: usize,
    query_heads: usize,
    scale: f32,
    options: abi.AttendOptions,
    mask_kind: abi.MaskKind,
    out: [*]f32, // (query_tokens, query_heads, value_dim)
};

pub const Error = error{ InvalidArgument, OutOfMemory, NotFinite };

/// What can be said without looking at what the cache holds.
pub fn check(cache: *const Cache, request: *const Request) Error!void {
    const config = &cache.config;
    if (request.query_heads == 0 or request.query_heads % config.num_kv_heads != 0) {
        message.set("query has {d} heads; expected a multiple of the cache's {d} kv heads", .{
            request.query_heads, config.num_kv_heads,
        });
        return error.InvalidArgument;
    }
    try check_query(request, config.head_dim);
}

/// The rest; the cache is locked.
pub fn check_held(cache: *const Cache, request: *const Request) error{InvalidArgument}!void {
    if (request.query_tokens > cache.next and cache.next > 0) {
        message.set("query has {d} tokens; the cache has seen only {d}", .{
            request.query_tokens, cache.next,
        });
        return error.InvalidArgument;
    }
    const options = &request.options;
    const sized = request.mask_kind != .none or options.mass != null;
    if (sized and options.live_tokens != cache.len()) {
        message.set("mask or mass is for {d} tokens; the cache holds {d}", .{
            options.live_tokens, cache.len(),
        });
        return error.InvalidArgument;
    }
}

fn check_query(request: *const Request, dim: usize) error{NotFinite}!void {
    const rows = request.query_tokens * request.query_heads;
    const finite = dispatch.table().check(&.{
        .rows = .{
            .first = @intFromPtr(request.query),
            .stride_bytes = @intCast(dim * @sizeOf(f32)),
            .dtype = @backingInt(abi.Dtype.f32),
            .count = rows,
            .dim = dim,
        },
        .limit = std.math.floatMax(f32),
    });
    if (finite) return;
    for (request.query[0 .. rows * dim], 0..) |x, i| {
        if (std.math.isFinite(x)) continue;
        message.set("query: value {d} is {d}; expected finite values", .{ i, x });
        return error.NotFinite;
    }
}
