//! Windows: up to 64 slots of a page, which kernels take at once; where they lie, what is to be
//! fetched meanwhile, and how they are laid out for many query rows. Called by attend.zig and
//! block.zig.
const std = @import("std");
const ahead_file = @import("ahead.zig");
const format = @import("format.zig");
const rows_file = @import("rows.zig");
const Ahead = ahead_file.Ahead;
const Table = @import("kernels.zig").Table;
const Tier = @import("tier.zig").Tier;
const line_bytes = ahead_file.line_bytes;

/// What is fetched lies a page ahead, or two if pages are smaller than this: memory that all
/// threads read at once takes longer to answer than a small page to compute.
const bytes_ahead_min = 16 << 10;
/// Nanoseconds of a kernel on a page of four rows by 128 dimensions, in the order of `format.all`:
/// how the lines to fetch are shared out. Only ratios matter, and only for speed.
const score_cost = [format.count]usize{ 830, 1020, 1020, 385, 210, 230, 265, 260, 360, 320 };
const update_cost = 110;
const accumulate_cost = [format.count]usize{ 735, 955, 955, 425, 310, 300, 330, 335, 545, 535 };

const Costs = struct { score: usize, accumulate: usize };

/// Where a thread goes on reading.
pub const Place = struct { tier: *const Tier, position: u64, head: usize };

/// Positions of a unit that any of some rows sees, and those that all of them see.
pub const Seen = struct { start: u64, end: u64, start_for_all: u64, end_for_all: u64 };

/// What the windows of a head in a tier have in common.
pub const Route = struct {
    tier: *const Tier,
    head: usize,
    key_bytes: usize,
    value_bytes: usize,
    window_tokens: u64,
    /// Distance of what is fetched.
    windows_ahead: u64,
    /// What lies before this is worth fetching, and then what lies at `after`.
    ahead_end: u64,
    after: ?Place,
    /// Whether a window's keys and values are one run, the whole page.
    whole: bool,
    costs: Costs,

    pub fn init(tier: *const Tier, head: usize, ahead_end: u64, after: ?Place) Route {
        const key_bytes = tier.key.bytes();
        const value_bytes = tier.value.bytes();
        const whole = tier.tokens_per_page <= format.page_tokens;
        const small = key_bytes + value_bytes < bytes_ahead_min;
        return .{
            .tier = tier,
            .head = head,
            .key_bytes = key_bytes,
            .value_bytes = value_bytes,
            .window_tokens = @min(format.page_tokens, tier.tokens_per_page),
            .windows_ahead = if (whole and small) 2 else 1,
            .ahead_end = ahead_end,
            .after = after,
            .whole = whole,
            .costs = .{
                .score = score_cost[@backingInt(tier.key.format)],
                .accumulate = accumulate_cost[@backingInt(tier.value.format)],
            },
        };
    }

    const Location = struct {
        keys: [*]const u8,
        values: [*]const u8,
        /// Positions of slot 0, and after the page's last one.
        base: u64,
        page_end: u64,
    };

    fn locate(route: *const Route, position: u64) Location {
        const tier = route.tier;
        const number = position / tier.tokens_per_page;
        const page = tier.page_at(number, route.head);
        const slot: usize = @intCast(position - number * tier.tokens_per_page);
        const first = slot / format.page_tokens * format.page_tokens;
        return .{
            .keys = page + rows_before(tier.key, first),
            .values = page + route.key_bytes + rows_before(tier.value, first),
            .base = number * tier.tokens_per_page + first,
            .page_end = (number + 1) * tier.tokens_per_page,
        };
    }

    /// The lines of the keys of the window at `position`, and of its values.
    fn parts(route: *const Route, position: u64) [2]Ahead {
        const at = route.locate(position);
        if (route.whole) return .{
            .{ .at = at.keys, .lines = route.key_bytes / line_bytes },
            .{ .at = at.values, .lines = route.value_bytes / line_bytes },
        };
        const tier = route.tier;
        const left = tier.tokens_per_page - at.base % tier.tokens_per_page;
        const rows: usize = @intCast(@min(format.page_tokens, left));
        return .{
            .{ .at = at.keys, .lines = rows * tier.key.row_bytes() / line_bytes },
            .{ .at = at.values, .lines = rows * tier.value.row_bytes() / line_bytes },
        };
    }

    /// What a thread should have before it gets to `position`, in two parts.
    fn beginning(route: *const Route, position: u64) [2]Ahead {
        var result = route.parts(position);
        if (route.windows_ahead == 1) return result;
        result[0].lines += result[1].lines;
        result[1].lines = 0;
        const second = position + route.window_tokens;
        if (second < route.tier.end) {
            result[1] = .{ .at = route.locate(second).keys, .lines = result[0].lines };
        }
        return result;
    }
};

/// Up to 64 slots of one page that kernels take at once.
pub const Window = struct {
    keys: [*]const u8,
    values: [*]const u8,
    /// For kernels that take many rows of floating-point numbers: keys laid out for them, values
    /// as f32.
    keys_for_many: ?[*]align(64) const f32,
    values_for_many: ?[*]const u8,
    /// For kernels that take many rows of quantized values: their codes.
    codes_for_many: ?[*]const u8,
    /// What the kernels should fetch meanwhile: all of the window that comes next.
    ahead_of_score: Ahead,
    ahead_of_update: Ahead,
    ahead_of_accumulate: Ahead,
    /// Position of slot 0.
    base: u64,
    /// Position after the last slot in use.
    end: u64,
    /// Whether there are 64 slots, and every row sees all of them.
    all_seen: bool,

    /// The window at `position`, cut at the end of `seen`, which are the positions that any row
    /// sees. In place: a window is large, and there are many.
    pub fn start(window: *Window, route: *const Route, position: u64, seen: Seen) void {
        const at = route.locate(position);
        window.keys = at.keys;
        window.values = at.values;
        window.keys_for_many = null;
        window.values_for_many = null;
        window.codes_for_many = null;
        window.base = at.base;
        window.end = @min(seen.end, at.page_end, at.base + format.page_tokens);
        window.all_seen = seen.start_for_all <= at.base and
            window.end == at.base + format.page_tokens and window.end <= seen.end_for_all;
        window.ahead_of_score = .none;
        window.ahead_of_update = .none;
        window.ahead_of_accumulate = .none;
        window.look_ahead(route);
    }

    fn look_ahead(window: *Window, route: *const Route) void {
        const next = window.base + route.windows_ahead * route.window_tokens;
        if (next < route.ahead_end) {
            const parts = route.parts(next);
            if (!route.whole) return window.share_apart(route.costs, parts);
            const lines = parts[0].lines + parts[1].lines;
            return window.share(route.costs, .{ .at = parts[0].at, .lines = lines });
        }
        const place = route.after orelse return;
        const there: Route = .init(place.tier, place.head, place.tier.end, null);
        const parts = there.beginning(place.position);
        if (route.windows_ahead == 1) return window.share_apart(route.costs, parts);
        // Two windows have no next one of their own.
        const last = window.base + route.window_tokens >= route.ahead_end;
        window.share(route.costs, parts[@intFromBool(last)]);
    }

    fn share_apart(window: *Window, costs: Costs, parts: [2]Ahead) void {
        window.share(.{ .score = 0, .accumulate = costs.accumulate }, parts[1]);
        window.ahead_of_score = parts[0];
    }

    /// Shares lines out among the kernels, by what they cost.
    fn share(window: *Window, costs: Costs, run: Ahead) void {
        const cost = costs.score + update_cost + costs.accumulate;
        const first = run.lines * costs.score / cost;
        const second = run.lines * update_cost / cost;
        window.ahead_of_score = .{ .at = run.at, .lines = first };
        window.ahead_of_update = .{ .at = run.at + first * line_bytes, .lines = second };
        window.ahead_of_accumulate = .{
            .at = run.at + (first + second) * line_bytes,
            .lines = run.lines - first - second,
        };
    }

    /// Slots up to the last one in use.
    fn slots(window: *const Window) usize {
        return @intCast(window.end - window.base);
    }

    /// Blocks that hold them.
    pub fn blocks(window: *const Window) usize {
        return (window.slots() + format.block_slots - 1) / format.block_slots;
    }

    /// Makes keys and values what kernels for many rows read, which changes no bit of what is
    /// computed. `memory` has room for 64 rows of keys, then 64 of values, as stored.
    pub fn unpack(
        window: *Window,
        table: *const Table,
        tier: *const Tier,
        memory: []align(64) f32,
    ) void {
        const key_dim = tier.key.dim_stored();
        if (table.lay_out_keys[@backingInt(tier.key.format)]) |lay_out_keys| {
            lay_out_keys(&.{
                .keys = window.keys,
                .dim = key_dim,
                .blocks = window.blocks(),
                .ahead = window.ahead_of_score,
                .target = memory.ptr,
            });
            window.keys_for_many = memory.ptr;
        }
        const values: [*]f32 = memory[format.page_tokens * key_dim ..].ptr;
        const f = @backingInt(tier.value.format);
        if (table.accumulate_packed[f] != null) {
            window.codes_for_many = window.values;
            if (table.lay_out_values[f]) |lay_out_values| {
                const target: [*]u8 = @ptrCast(values);
                lay_out_values(&.{
                    .values = window.values,
                    .dim = tier.value.dim_stored(),
                    .target = target,
                });
                window.codes_for_many = target;
            }
        }
        window.values_for_many = switch (tier.value.format) {
            .f32 => window.values,
            .f16, .bf16 => unpack_values(
                table,
                tier.value,
                window.values,
                window.slots(),
                values,
            ),
            else => null,
        };
    }

    fn unpack_values(
        table: *const Table,
        half: format.Half,
        from: [*]const u8,
        count: usize,
        target: [*]f32,
    ) [*]const u8 {
        const dim = half.dim_stored();
        _ = table.read(&.{
            .rows = rows_file.of_half(half, from, count, dim),
            .count = count,
            .target = target,
            .dim_stored = dim,
            .tail_format = @backingInt(format.Format.f32),
            .rotated = false,
            .limit = std.math.inf(f32),
        });
        return @ptrCast(target);
    }
};

/// Bytes before slot `first`. Only floating-point pages have more than one window.
fn rows_before(half: format.Half, first: usize) usize {
    return if (first == 0) 0 else first * half.row_bytes();
}
