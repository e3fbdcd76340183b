/* QTR_API marks what a shared build of the core exports. */
#ifndef QUANTRATURE_EXPORT_H
#define QUANTRATURE_EXPORT_H

#if defined(QUANTRATURE_STATIC)
#define QTR_API
#elif defined(_WIN32)
#if defined(QUANTRATURE_BUILDING)
#define QTR_API __declspec(dllexport)
#else
#define QTR_API __declspec(dllimport)
#endif
#else
#define QTR_API __attribute__((visibility("default")))
#endif

#endif
