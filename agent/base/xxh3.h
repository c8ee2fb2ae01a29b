/* XXH3, by the instructions that this processor has where the library offers that: the plain functions are of what the
 * library was compiled for, on x86-64 mostly SSE2, and pages in the cache are hashed three times as fast with AVX2. */
#ifndef BASE_XXH3_H
#define BASE_XXH3_H

#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif

#endif
