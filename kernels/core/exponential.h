/* exp where it is at most 1, for native code of several operators. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* exp for x <= 0, in a form that compilers turn into vectors; 2e-7 off at most, 0 below -87. NaN
 * stays NaN, and is kept from the conversion to int. */
static inline float exp_float(float x) {
    const float low = x > -87.0f ? x : -87.0f;
    const float n = (low * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float f = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x >= -87.0f ? p * power : x < -87.0f ? 0.0f : x;
}

static inline double exp_double(double x) { return exp(x); }
