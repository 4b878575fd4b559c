/* A cache of packed keys and values, from C: append, attend, statistics, errors.
 *
 * Build it against the library of the Python package, whose folder is that of `_native` in kvz:
 *
 *     python -m ziglang cc -Iinclude examples/c/attend.c $folder/libkvz.so -Wl,-rpath,$folder
 */
#include <stdio.h>
#include <stdlib.h>

#include "kvz.h"

enum { HEADS = 2, QUERY_HEADS = 8, DIM = 64, TOKENS = 500 };

static void check(kvz_status_t status) {
    if (status == KVZ_STATUS_OK) return;
    fprintf(stderr, "kvz: %s\n", kvz_last_error());
    exit(1);
}

int main(void) {
    kvz_pool_config_t pool_config = KVZ_POOL_CONFIG_DEFAULT;
    kvz_pool_t *pool;
    check(kvz_pool_new(&pool_config, &pool));

    kvz_cache_config_t config = KVZ_CACHE_CONFIG_DEFAULT;
    config.num_kv_heads = HEADS;
    config.head_dim = DIM;
    config.tail_length = 64;
    config.key_format = KVZ_FORMAT_Q8;
    config.value_format = KVZ_FORMAT_Q4;
    kvz_cache_t *cache;
    check(kvz_cache_new(&config, pool, &cache));

    static float keys[TOKENS][HEADS][DIM], values[TOKENS][HEADS][DIM];
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HEADS; h++)
            for (int d = 0; d < DIM; d++) {
                keys[t][h][d] = (float)((t * 7 + h * 3 + d) % 11 - 5) / 5;
                values[t][h][d] = (float)(h + 1);
            }
    check(kvz_cache_append(cache, keys, values, TOKENS, NULL));

    static float query[QUERY_HEADS][DIM], out[QUERY_HEADS][DIM];
    check(kvz_cache_attend(cache, query[0], 1, QUERY_HEADS, 0.125f, NULL, out[0]));
    printf("head 0: %.2f, head 7: %.2f\n", out[0][0], out[7][0]);

    kvz_cache_stats_t stats = KVZ_CACHE_STATS_DEFAULT;
    check(kvz_cache_stats(cache, &stats));
    printf("%llu tokens: %llu packed, %llu in the tail\n",
           (unsigned long long)stats.total_tokens, (unsigned long long)stats.store_tokens,
           (unsigned long long)stats.tail_tokens);

    keys[0][0][0] = 1e30f; /* more than float16 holds */
    if (kvz_cache_append(cache, keys, values, 1, NULL) == KVZ_STATUS_NOT_REPRESENTABLE)
        printf("refused: %s\n", kvz_last_error());

    kvz_cache_free(cache);
    kvz_pool_free(pool);
    return 0;
}
