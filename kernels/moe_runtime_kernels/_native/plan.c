// The routing plan of a few or many choices, by counting: one pass for the counts, one for the places.
//
// Experts' rows lie one after the other, in the order of choices; a choice outside 0..experts-1 is dropped.

#include <stdint.h>
#include <string.h>

enum { MOST_EXPERTS = 1024 };

static inline int64_t id(const void *ids, int is_wide, int64_t n) {
    return is_wide ? ((const int64_t *)ids)[n] : ((const int32_t *)ids)[n];
}

// ids [tokens * choices] int64 if is_wide, else int32; row, token, slot the same in int32; offset [experts];
// tile_end [num_heights, experts]. Returns 0, or 1 for more experts than it has places for.
int moe_runtime_plan(const void *ids, int32_t is_wide, int64_t size, int64_t choices, int64_t experts, int32_t *row,
                     int32_t *token, int32_t *slot, int32_t *offset, int32_t *tile_end, const int32_t *height,
                     int64_t num_heights) {
    int32_t next[MOST_EXPERTS];
    if (experts > MOST_EXPERTS) return 1;
    memset(offset, 0, (size_t)experts * sizeof *offset);
    for (int64_t n = 0; n < size; n++) {
        int64_t e = id(ids, is_wide, n);
        if (e >= 0 && e < experts) offset[e]++;
    }
    for (int64_t m = 0; m < num_heights; m++) {
        int32_t tiles = 0;
        for (int64_t e = 0; e < experts; e++) {
            tiles += (offset[e] + height[m] - 1) / height[m];
            tile_end[m * experts + e] = tiles;
        }
    }
    int32_t used = 0;
    for (int64_t e = 0; e < experts; e++) {
        next[e] = used;
        used += offset[e];
        offset[e] = used;
    }
    for (int64_t n = 0; n < size; n++) {
        int64_t e = id(ids, is_wide, n);
        int is_kept = e >= 0 && e < experts;
        row[n] = is_kept ? next[e]++ : -1;
        if (is_kept) {
            slot[row[n]] = (int32_t)n;
            token[row[n]] = (int32_t)(n / choices);
        }
    }
    for (int64_t n = used; n < size; n++) slot[n] = token[n] = -1;
    return 0;
}
