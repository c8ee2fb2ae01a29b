# Time, CPU and bytes of a sync point by the share of pages changed, beside rsync: from results.csv (`table`) one picture of three parts (`picture`, an SVG).
set terminal svg size 900,1200 dynamic background "white" font "sans-serif,15"
set output picture
set datafile separator ","
array ways[3] = ["memsync", "rsync", "rsync --block-size=4096 --no-whole-file --inplace"]
array colour[3] = ["#0072b2", "#e69f00", "#d55e00"]
# share and value of one metric, joined by item
of(way, metric) = sprintf("< awk -F, '$3 == \"share\" { share[$1] = $4 } $2 == \"%s\" && $3 == \"%s\" && $1 ~ /tmpfs$/ { v[$1] = $4 } END { for (i in v) print share[i] \",\" v[i] }' '%s' | sort -g", way, metric, table)
set grid lc rgb "#dddddd"
set border 3
set tics nomirror
set key bottom right
set lmargin 12
set logscale xy
set xlabel "pages changed, 64 bytes in each (%)"
set multiplot layout 3,1 spacing 0,0.08
set title "Until the change is at the other end"
set ylabel "ms"
plot for [i=1:3] of(ways[i], "time") using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[i] title ways[i]
set title "CPU, both ends"
set ylabel "s"
plot for [i=1:3] of(ways[i], "cpu") using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[i] title ways[i]
set title "Bytes on the wire"
set ylabel "MB"
plot for [i=1:3] of(ways[i], "wire") using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[i] title ways[i]
unset multiplot
