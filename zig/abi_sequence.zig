//! The part of the ABI about several caches: forks, and what they share. Exported by abi.zig.
const abi = @import("abi.zig");
const status_file = @import("status.zig");
const Cache = abi.Cache;
const Status = abi.Status;
const fail = status_file.fail;

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
    out.* = cache.shared_bytes();
    return .ok;
}
